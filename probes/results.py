"""Results: what was found of each part of the work, a row for each sequence, and all of it put together."""

from collections.abc import MutableMapping
from dataclasses import replace

import numpy as np

from probes.attributed import EDGES, GRADIENT, LAYERS, About, Attribution
from probes.effects import Found, Job
from probes.gates import Gates
from probes.parts import DONE
from probes.routed import Routed

Parts = MutableMapping[str, np.ndarray]


class Results:
    """They lie in `parts`, by job and sequence, so that they stay of use when another number of sequences goes through at
    once, and to whoever goes on where this process was ended."""

    def __init__(self, parts: Parts, todo: list[Job], gates: Gates, about: About):
        self._parts, self._todo, self._gates, self._about = parts, todo, gates, about

    def has(self, key: str, first: int, last: int) -> bool:
        done = self._parts.get(f"{key}{DONE}")
        return done is not None and bool(np.all(done[first:last] == 1))

    def keep(self, job: Job, first: int, last: int, found: dict[str, Found]) -> None:
        """What a job found by kind, on the sequences from `first` to before `last`."""
        count = self._about.sequences
        for kind, each in found.items():
            self._put(f"{job.key}|{kind}.value", count, first, last, each.value)
            if each.square is not None:
                self._put(f"{job.key}|{kind}.square", count, first, last, each.square)
        self._finish(job.key, count, first, last)

    def keep_curve(self, key: str, count: int, first: int, last: int, values: np.ndarray) -> None:
        """The targets of a what-if, on some of its `count` sequences."""
        self._put(key, count, first, last, values)
        self._finish(key, count, first, last)

    def curve(self, key: str) -> np.ndarray:
        return self._parts[key].mean(0)

    def _finish(self, key: str, count: int, first: int, last: int) -> None:
        """Last, for after any of these the work may end."""
        self._put(f"{key}{DONE}", count, first, last, np.ones(last - first))

    def _put(self, key: str, count: int, first: int, last: int, values: np.ndarray) -> None:
        whole = self._parts.get(key)
        if whole is None:
            whole = np.full((count, *values.shape[1:]), np.nan)
        whole = whole.copy()  # of a file it cannot be written to
        whole[first:last] = values
        self._parts[key] = whole

    def foreseen(self, routed: Routed) -> Attribution:
        """As what will be found, as far as that tells which rankings there will be."""
        found = self._empty(routed, self._about)
        for (kind, method), shape in self._kinds().items():
            getattr(found, kind)[method] = np.arange(np.prod(shape), dtype=float).reshape(shape)
        return found

    def _kinds(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(kind, method) of all that is asked for, with the shape of its values."""
        layout, found = self._gates.layout, {}
        shapes = {EDGES: layout.triangle().shape, LAYERS: (len(layout.layers),)}
        for job in self._todo:
            both = job.method == GRADIENT and not self._gates.no_edges
            for kind in (EDGES, LAYERS) if both else (job.kind,):
                found[kind, job.method] = shapes[kind]
        return found

    def _empty(self, routed: Routed, about: About) -> Attribution:
        layout = self._gates.layout
        return Attribution(
            layout, about, weight=routed.weight, share=routed.share, final_share=routed.final_share
        )

    def assembled(self, value: float, routed: Routed) -> Attribution:
        """All of it, with the target's `value` of the model as it is."""
        layout, gates = self._gates.layout, self._gates
        notes = [gates.no_edges] if gates.no_edges else []
        lacking = [layout.layers[row].label for row, able in enumerate(gates.gated) if not able]
        if lacking:
            notes.append(f"No module returns just what {lacking[0]} adds, so it was not attributed.")
        found = self._empty(routed, replace(self._about, value=value, notes=tuple(notes)))
        exists = {EDGES: layout.triangle() & np.array(gates.reached)[:, None], LAYERS: np.array(gates.gated)}
        for (kind, method), shape in self._kinds().items():
            value, square = (self._gathered(kind, method, what, shape) for what in ("value", "square"))
            value[:, ~exists[kind]] = np.nan
            getattr(found, kind)[method] = value.mean(0)
            getattr(found, f"{kind}_std")[method] = value.std(0)
            if square is not None:
                spread = np.sqrt(np.maximum(square.mean(0) - value.mean(0) ** 2, 0))
                getattr(found, f"{kind}_token_std")[method] = np.where(exists[kind], spread, np.nan)
        return found

    def _gathered(self, kind: str, method: str, what: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """[B, *shape] of one method, NaN where no job was; None where none of its jobs has it."""
        found, any_there = np.full((self._about.sequences, *shape), np.nan), False
        for job in self._todo:
            values = self._parts.get(f"{job.key}|{kind}.{what}")
            if job.method != method or values is None:
                continue
            any_there = True
            if job.row is None:
                found[:] = values.reshape(-1, *shape)
            elif len(shape) == 1:  # a layer's row is its own
                found[:, job.row] = values[:, 0]
            else:  # an edge's is a read, with so many sources
                found[:, job.row, : values.shape[1]] = values
        return found if any_there or what == "value" else None
