"""Work: all that is asked of a model, on some sequences at a time, in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from probes import pruning
from probes.attributed import About, Attribution
from probes.batch import Batch
from probes.budget import Estimate, bytes_of_one, resident, sequences_that_fit
from probes.effects import Effects, Job
from probes.gates import Gates
from probes.manifest import RunError
from probes.objective import token_means
from probes.pace import Pace, Pass
from probes.results import Parts, Results
from probes.routed import Routed
from probes.target import said

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
    """All jobs on all sequences, some sequences at a time. What is found goes into `parts`."""

    def __init__(
        self, whole: Batch, other: Batch | None, todo: list[Job], gates: Gates, parts: Parts, about: About
    ):
        self._whole, self._other, self._todo, self._gates, self._about = whole, other, todo, gates, about
        self._results = Results(parts, todo, gates, about)
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
                if not self._results.has(job.key, first, last):
                    self._tell(effects, tick, job.kin, job.row or 0)
                    self._results.keep(job, first, last, job.run(effects))
        found = self._results.assembled(float(np.concatenate(base).mean()), Routed.mean(routed))
        return found if self._other is None else replace(found, curves=self._curves(found, others, tick))

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
                done = self._results.has(job.key, first, last)
                yield _Ahead(job.kin, job.row or 0, job.passes, last - first, job.backward, done)
        if self._other is None:
            return
        plans = pruning.plans(self._results.foreseen(routed), self._gates, self._about.seed)
        for first, last in self._pieces(self._other):
            yield _Ahead(_ROUTED, 0, 1, last - first)
            for plan in plans:
                done = self._results.has(f"other {plan.key}", first, last)
                yield _Ahead(plan.kin, 0, plan.passes, last - first, done=done)

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

    def _check_finite(self, values: np.ndarray, first: int, more: str = "") -> None:
        if not np.isfinite(values).all():
            number = first + int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise RunError(
                f"The {self._about.target} of the model as it is is no finite number on sequence {number}{more}, so nothing "
                "can be attributed: take a checkpoint from before the model diverged, or leave out sequences of padding alone."
            )

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
                if not self._results.has(key, first, last):
                    self._tell(effects, tick, plan.kin, 0)
                    count = self._other.sequences
                    self._results.keep_curve(key, count, first, last, plan.run(effects))
        return pruning.curves(plans, {plan.key: self._results.curve(f"other {plan.key}") for plan in plans})
