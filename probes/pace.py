"""Pace: the seconds that one pass of each kind takes here, measured on the very work that is to come."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from probes.effects import Effects

# A machine that does other things too is not the same for long: what is looked at grows with what is to come, and is never
# more than that.
_LEAST, _MOST, _SHARE = 1.0, 20.0, 0.03  # seconds, seconds, of all that is to come


@dataclass(frozen=True)
class Pass:
    """One forward, with its backward or without: what `kin` it is of, at which read or layer (`row`), and how many such
    are to come."""

    kin: str
    row: int
    run: Callable[[Effects], object]
    count: int


class Pace:
    """`of(kin, row)`: seconds of one pass. Between the rows that were measured they lie on a straight line; what was not
    measured takes 1."""

    def __init__(self, taken: Mapping[str, Mapping[int, float]]):
        self._taken = taken

    def of(self, kin: str, row: int) -> float:
        rows = sorted(self._taken.get(kin, ()))
        return float(np.interp(row, rows, [self._taken[kin][each] for each in rows])) if rows else 1.0

    @classmethod
    def measured(cls, passes: Iterable[Pass], effects: Effects) -> "Pace":
        """Each once to warm up, then all in turn, so that each meets the same hindrances."""
        passes = list(passes)
        for each in passes:
            _seconds(each, effects)
        taken: list[list[float]] = [[] for _ in passes]
        begun = time.perf_counter()
        while passes:
            for each, mine in zip(passes, taken, strict=True):
                mine.append(_seconds(each, effects))
            expected = sum(
                each.count * statistics.fmean(mine) for each, mine in zip(passes, taken, strict=True)
            )
            if time.perf_counter() - begun >= min(max(_LEAST, _SHARE * expected), _MOST, expected):
                break
        found: dict[str, dict[int, float]] = {}
        for each, mine in zip(passes, taken, strict=True):
            found.setdefault(each.kin, {})[each.row] = statistics.fmean(mine)
        return cls(found)


def _seconds(each: Pass, effects: Effects) -> float:
    begun = time.perf_counter()
    each.run(effects)
    if effects.edges.is_cuda:
        torch.cuda.synchronize(effects.edges.device)
    return time.perf_counter() - begun
