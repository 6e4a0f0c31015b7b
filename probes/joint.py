"""The recorded steps of processes that train together, as the recorder of each sees them: handed over here, told of on rank 0.

It runs on the training's side until a step is handed over, and in the thread that merges (merging.py) when all have.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from probes.clock import Clock
from probes.faults import Faults
from probes.gradients import NORMS
from probes.merging import END
from probes.mirrors import Mirror
from probes.sampled import SAMPLED_METRICS
from probes.scalars import Scalars
from probes.scaling import LossScale
from probes.taps import MATRICES
from probes.together import Found, Handed, Said, Together
from probes.vocabulary import GRADIENTS
from probes.watched import Watch
from probes.writer import RunWriter

Told = Callable[[int, dict, dict, dict], Iterable]


class Joint:
    """`put` each recorded step, and at the end `put_last`; then `close`. `told` makes rows of a step's metrics, counts and
    sample."""

    def __init__(
        self,
        together: Together,
        clock: Clock,
        scale: LossScale,
        faults: Faults,
        scalars: Scalars,
        writer: RunWriter,
        mirror: Mirror | None,
        told: Told,
    ):
        self._together, self._clock, self._scale, self._faults = together, clock, scale, faults
        self._scalars, self._writer, self._mirror, self._told = scalars, writer, mirror, told

    @property
    def keeps_scalars(self) -> bool:
        """Whether what is logged here waits for the next step, to be sent to rank 0."""
        return self._together.speaks

    @property
    def settled(self) -> float:
        """The last step of which no more rows will come from other processes."""
        return self._together.settled

    def put(self, watch: Watch) -> None:
        """Hand this step's sums over, to be merged with those of the others."""
        now, scale = self._clock.now, self._scale
        if not self._together.parallel.known:
            untold = RuntimeError("nothing tells what becomes of the gradients of several processes")
            self._faults.caught(untold, *GRADIENTS, *NORMS)
        left_out = self._scalars.logged | (set() if scale.known() else set(GRADIENTS))
        vain = self._clock.vain()
        given = {"skips": now.skips, "scale": scale.value, "vain": vain}
        own = {name: value for name, value in given.items() if value is not None}
        if scale.given or vain is not None:
            own["skipped"] = torch.zeros(()) if watch.skipped is None else watch.skipped

        def done(found: Found | None, own: dict, why: str, said: Said) -> None:
            step = now.attempt - int(own.get("skips", 0))
            self._writer.reached(step)
            if self._writer.rank:
                return
            if found is None:
                self._writer.lose(step, why)
                return
            metrics, counts, sample = ({name: x.numpy() for name, x in part.items()} for part in found)
            if own.get("vain", 0):
                metrics, counts, sample, own = {}, {}, {}, {"skipped": np.float32(1)}
            if "skipped" in own:
                metrics["skipped"] = own["skipped"]
            missing = left_out | self._together.faults
            metrics = {name: value for name, value in metrics.items() if name not in missing}
            sample = {} if missing & set(SAMPLED_METRICS) else sample
            self._write([*said, *self._told(step, metrics, counts, sample)], step - 1)

        wrong = frozenset(self._faults.now)
        self._together.hand(
            Handed(now.attempt, watch.mode == MATRICES, watch, done, wrong, own, self._said())
        )

    def put_last(self, watch: Watch) -> None:
        """What was logged since the last recorded step, where another process than rank 0 knows the loss. Nothing else is taken
        of what was measured since."""
        if not self._together.staged:
            return
        watch.forget()

        def done(found: Found | None, own: dict, why: str, said: Said) -> None:
            if said:
                self._write(said, -1)

        self._together.hand(Handed(END, False, watch, done, said=self._said()))

    def close(self, status: str) -> bool:
        """Whether all that was handed over has been merged."""
        return self._together.close(status)

    def _said(self) -> Said:
        """What was logged here, where this process tells rank 0 of it."""
        if not self._together.speaks:
            return []
        pending = [each for each in self._scalars.take() if each[0] in self._scalars.logged]
        return [(name, moment.attempt, value) for name, moment, value in pending]

    def _write(self, rows: list, complete: int) -> None:
        rows = rows if self._mirror is None else self._mirror.watch(rows)
        self._writer.put(lambda: rows, complete=complete)
