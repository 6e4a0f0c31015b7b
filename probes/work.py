"""Work: all that is asked of a model, on some sequences at a time, in bounded memory, kept as it is done."""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace

import numpy as np

from probes import pruning
from probes.attributed import EDGES, GRADIENT, LAYERS, About, Attribution
from probes.batch import Batch
from probes.budget import Estimate, bytes_of_one, resident, sequences_that_fit
from probes.effects import Effects, Job
from probes.gates import Gates
from probes.manifest import RunError
from probes.objective import token_means
from probes.pace import Pace, Pass
from probes.parts import DONE
from probes.routed import Routed
from probes.target import said

Parts = MutableMapping[str, np.ndarray]
_ROUTED = "routed"


@dataclass(frozen=True)
class _Ahead:
    """Passes to come: so many of a kin at a row, of so many sequences; whether they are done already."""

    kin: str
    row: int
    count: int
    size: int
    backward: bool = False
    done: bool = False


class Work:
    """All jobs on all sequences, some sequences at a time. What is done lies in `parts`, a row for each sequence, so
    that it stays of use when another number of them goes through at once."""

    def __init__(
        self, whole: Batch, other: Batch | None, todo: list[Job], gates: Gates, parts: Parts, about: About
    ):
        self._whole, self._other, self._todo, self._gates, self._parts = whole, other, todo, gates, parts
        self._about = about
        self._pace, self._timed = Pace({}), 1

    def plan(self, memory: float | None, timed: bool) -> Estimate | None:
        """See how many sequences go through at once and, where somebody wants to know it, what all will cost."""
        one = self._whole.part(0, 1)
        each = bytes_of_one(one)
        most = max(self._whole.sequences, self._other.sequences if self._other else 0)
        fit = sequences_that_fit(each, most, memory, one.edges.device)
        if fit > 1 and self._whole.part(0, 2).is_one_number:
            fit = 1
        self._at_once = -(-most // -(-most // fit))  # in parts of one size
        if not timed:
            return None
        some = self._whole.part(0, self._pieces(self._whole)[0][1])
        self._timed = some.sequences
        ahead = list(self._ahead(Routed.seen(some)))
        left = [part for part in ahead if not part.done]
        self._pace = Pace.measured(self._samples(left), some)
        seconds, total = (sum(self._cost(part) for part in parts) for parts in (left, ahead))
        return Estimate(
            seconds,
            resident() + each * self._at_once,
            sum(part.count for part in left if not part.backward),
            sum(part.count for part in left if part.backward),
            self._at_once,
            self._whole.sequences,
            1 - seconds / total if total else 0.0,
        )

    def done(self, tick: Callable[[float], object]) -> Attribution:
        """Do it. `tick` is told the seconds that each pass was to take."""
        # All are looked at first: what is wrong with the last sequence must not be met after hours.
        pieces = [(first, last, self._whole.part(first, last)) for first, last in self._pieces(self._whole)]
        routed, base = [], []
        for first, last, effects in pieces:
            self._tell(effects, tick, _ROUTED, 0)
            routed.append(self._looked(lambda effects=effects: Routed.seen(effects), first, last))
            base.append(token_means(effects.base).double().cpu().numpy())
            self._check_finite(base[-1], first)
        others = self._others(tick)
        for first, last, effects in pieces:
            for job in self._todo:
                if not self._has(job.key, first, last):
                    self._tell(effects, tick, job.kin, job.row or 0)
                    self._do(job, effects, first, last)
        found = self._assembled(float(np.concatenate(base).mean()), Routed.mean(routed))
        return found if self._other is None else replace(found, curves=self._curves(found, others, tick))

    def _do(self, job: Job, effects: Effects, first: int, last: int) -> None:
        for kind, found in job.run(effects).items():
            self._keep(f"{job.key}|{kind}.value", self._whole, first, last, found.value)
            if found.square is not None:
                self._keep(f"{job.key}|{kind}.square", self._whole, first, last, found.square)
        # Last, for after any of these the work may end.
        self._keep(f"{job.key}{DONE}", self._whole, first, last, np.ones(last - first))

    def _others(self, tick: Callable[[float], object]) -> list[tuple[int, int, Effects]]:
        """The sequences of the what-ifs, with their targets."""
        found = []
        for first, last in self._pieces(self._other) if self._other else ():
            effects = self._other.part(first, last)
            self._tell(effects, tick, _ROUTED, 0)
            base = self._looked(lambda effects=effects: effects.base, first, last, " of the what-if")
            self._check_finite(token_means(base).double().cpu().numpy(), first, " of the what-if")
            found.append((first, last, effects))
        return found

    def _looked(self, look: Callable, first: int, last: int, more: str = "") -> object:
        try:
            return look()
        except RunError:
            raise
        except Exception as error:  # whatever a model makes of what it is given
            raise RunError(
                f"A forward of {type(self._whole.root).__name__} failed on sequences {first + 1} to {last}{more}: {said(error)}."
            ) from error

    # What it costs

    def _ahead(self, routed: Routed) -> Iterator[_Ahead]:
        for first, last in self._pieces(self._whole):
            yield _Ahead(_ROUTED, 0, 1, last - first)
            for job in self._todo:
                done = self._has(job.key, first, last)
                yield _Ahead(job.kin, job.row or 0, job.passes, last - first, job.backward, done)
        if self._other is None:
            return
        plans = pruning.plans(self._foreseen(routed), self._gates, self._about.seed)
        for first, last in self._pieces(self._other):
            yield _Ahead(_ROUTED, 0, 1, last - first)
            for plan in plans:
                done = self._has(f"other {plan.key}", first, last)
                yield _Ahead(plan.kin, 0, plan.passes, last - first, done=done)

    def _foreseen(self, routed: Routed) -> Attribution:
        """As what will be found, as far as that tells which rankings there will be."""
        found = self._empty(routed, self._about)
        for (kind, method), shape in self._kinds().items():
            getattr(found, kind)[method] = np.arange(np.prod(shape), dtype=float).reshape(shape)
        return found

    def _samples(self, left: list[_Ahead]) -> Iterator[Pass]:
        """A pass of each kin that is to come, of kins with a backward at its first, middle and last row: a backward
        goes back as far as the gates that it is for."""
        runs = {job.kin: {} for job in self._todo}
        for job in self._todo:
            runs[job.kin][job.row or 0] = job.once
        runs[_ROUTED] = {0: Routed.seen}
        if self._other is not None:
            runs |= {plan: {0: once} for plan, once in pruning.once(self._gates).items() if plan not in runs}
        for kin in dict.fromkeys(part.kin for part in left):
            mine = [part for part in left if part.kin == kin]
            rows = sorted({part.row for part in mine if part.row in runs[kin]}) or sorted(runs[kin])
            ends = (0, len(rows) // 2, len(rows) - 1) if mine[0].backward else (len(rows) // 2,)
            chosen = sorted({rows[end] for end in ends})
            count = sum(part.count * part.size for part in mine) / self._timed
            for row in chosen:
                yield Pass(kin, row, runs[kin][row], count / len(chosen))

    def _cost(self, part: _Ahead) -> float:
        return part.count * self._pace.of(part.kin, part.row) * part.size / self._timed

    def _tell(self, effects: Effects, tick: Callable[[float], object], kin: str, row: int) -> None:
        seconds = self._cost(_Ahead(kin, row, 1, effects.sequences))
        effects.passed = lambda: tick(seconds)

    # What is done

    def _pieces(self, batch: Batch) -> list[tuple[int, int]]:
        count = batch.sequences
        return [(first, min(first + self._at_once, count)) for first in range(0, count, self._at_once)]

    def _has(self, key: str, first: int, last: int) -> bool:
        done = self._parts.get(f"{key}{DONE}")
        return done is not None and bool(np.all(done[first:last] == 1))

    def _keep(self, key: str, batch: Batch, first: int, last: int, values: np.ndarray) -> None:
        whole = self._parts.get(key)
        if whole is None:
            whole = np.full((batch.sequences, *values.shape[1:]), np.nan)
        whole = whole.copy()  # of a file it cannot be written to
        whole[first:last] = values
        self._parts[key] = whole

    def _check_finite(self, values: np.ndarray, first: int, more: str = "") -> None:
        if not np.isfinite(values).all():
            number = first + int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise RunError(
                f"The {self._about.target} of the model as it is is no finite number on sequence {number}{more}, so nothing "
                "can be attributed: take a checkpoint from before the model diverged, or leave out sequences of padding alone."
            )

    # What was found

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

    def _assembled(self, value: float, routed: Routed) -> Attribution:
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
        found, any_there = np.full((self._whole.sequences, *shape), np.nan), False
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

    def _curves(
        self,
        found: Attribution,
        pieces: list[tuple[int, int, Effects]],
        tick: Callable[[float], object],
    ) -> dict:
        plans = pruning.plans(found, self._gates, self._about.seed)
        for first, last, effects in pieces:
            for plan in plans:
                key = f"other {plan.key}"
                if not self._has(key, first, last):
                    self._tell(effects, tick, plan.kin, 0)
                    self._keep(key, self._other, first, last, plan.run(effects))
                    self._keep(f"{key}{DONE}", self._other, first, last, np.ones(last - first))
        return pruning.curves(plans, {plan.key: self._parts[f"other {plan.key}"].mean(0) for plan in plans})
