"""The figures of what recording costs, and their table. `probes.bench` measures them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from probes.schedule import Schedule

# A schedule is amortised over a training of this many steps.
HORIZON = 10_000


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(*values * 3)
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Cost:
    """What recording costs one model on one machine. Times in seconds, shares of an unrecorded step, bytes.

    `seconds` holds the time of each step, pair by pair, for "unrecorded", "vectors" and "matrices". Printed, it is
    a table.
    """

    model: str
    parameters: int
    model_bytes: int
    probe_bytes: int
    machine: str
    compiled: bool
    every: Schedule
    matrices_every: Schedule
    seconds: Mapping[str, list[float]]
    hook_calls: int
    seconds_per_call: float

    @property
    def pairs(self) -> int:
        return len(self.seconds["unrecorded"])

    @property
    def step(self) -> Spread:
        """Seconds of an unrecorded step."""
        return Spread.of(self.seconds["unrecorded"])

    @property
    def vectors(self) -> Spread:
        """What a step with vectors takes longer, as a share of an unrecorded step."""
        return Spread.of(self._shares("vectors"))

    @property
    def matrices(self) -> Spread:
        """The same of a step with matrices, which records vectors too."""
        return Spread.of(self._shares("matrices"))

    @property
    def unrecorded(self) -> float:
        """What the hooks cost a step that is not recorded: calls × time per call. Too small to be timed in place."""
        return self.hook_calls * self.seconds_per_call / self.step.median

    @property
    def amortised(self) -> Spread:
        """The mean over the first 10,000 steps of a training with this schedule."""
        matrices = sum(map(self.matrices_every, range(HORIZON))) / HORIZON
        either = sum(self.every(s) or self.matrices_every(s) for s in range(HORIZON)) / HORIZON
        pairs = zip(self._shares("vectors"), self._shares("matrices"), strict=True)
        return Spread.of([self.unrecorded + (either - matrices) * v + matrices * m for v, m in pairs])

    def _shares(self, kind: str) -> list[float]:
        both = zip(self.seconds[kind], self.seconds["unrecorded"], strict=True)
        return [recorded / unrecorded - 1 for recorded, unrecorded in both]

    def __str__(self) -> str:
        way = "compiled" if self.compiled else "eager"
        calls = f"{self.hook_calls} hook calls × {1e6 * self.seconds_per_call:.2f} µs"
        schedule = f"vectors {self.every}, matrices {self.matrices_every}"
        size = (
            f"{100 * self.probe_bytes / self.model_bytes:.2g} % of the parameters' {_size(self.model_bytes)}"
        )
        rows = [
            ("", "median", "quartiles"),
            ("a step with vectors", _percent(self.vectors.median), _range(self.vectors)),
            ("a step with matrices", _percent(self.matrices.median), _range(self.matrices)),
            ("an unrecorded step", _percent(self.unrecorded, 4), calls),
            ("amortised", _percent(self.amortised.median, 3), f"{_range(self.amortised, 3)}   {schedule}"),
            ("memory held", _size(self.probe_bytes), size),
        ]
        low, middle, high = (1e3 * seconds for seconds in self.step)
        return "\n".join(
            [
                f"{self.model}, {self.parameters:,} parameters, {way}, {self.machine}, {self.pairs} pairs",
                f"An unrecorded step takes {middle:.4g} ms (quartiles {low:.4g} – {high:.4g}). Recording adds:",
                *(f"{name:<22}{value:>12}   {note}".rstrip() for name, value, note in rows),
            ]
        )


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:+.{digits}f} %"


def _range(spread: Spread, digits: int = 2) -> str:
    return f"{100 * spread.low:+.{digits}f} – {100 * spread.high:+.{digits}f} %"


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
