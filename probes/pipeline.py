"""The stage of a pipeline that this process trains, as torch.distributed.pipelining runs it.

A schedule tries a stage once on tensors that hold anything, sends micro-batches through it, and when the last backward pass
has ended brings the gradients together and divides them. Only its own calls tell which of these is going on.
"""

import functools
import sys
from collections.abc import Callable

from torch import nn

from probes.manifest import RunError


class Pipeline:
    """One stage, `index` of `count`. `running` is whether a micro-batch goes through it; `factor` is what the schedule divided
    the gradients by last, for each micro-batch has a loss of its own."""

    def __init__(self, stage):
        self._stage = stage
        self.module: nn.Module = stage.submod
        self.index, self.count = stage.stage_index, stage.num_stages
        self.running = False
        self.factor = 1.0

    @classmethod
    def of(cls, model: object) -> "Pipeline | None":
        """That of a schedule, or of a stage; None for a module. Raises RunError for several stages in one process."""
        schedules = sys.modules.get("torch.distributed.pipelining.schedules")
        stages = sys.modules.get("torch.distributed.pipelining.stage")
        if schedules is None or stages is None:
            return None
        if isinstance(model, schedules._PipelineSchedule):
            held = getattr(model, "_stages", None) or [model._stage]
            if len(held) > 1:
                raise RunError(
                    f"{type(model).__name__} runs {len(held)} stages in this process, and depthscope records one in each: "
                    "take a schedule of one stage for each process, as Schedule1F1B or ScheduleGPipe."
                )
            return cls(held[0])
        return cls(model) if isinstance(model, stages._PipelineStageBase) else None

    def watch(self, reduced: Callable[[], None]) -> None:
        """Note micro-batches, and call `reduced` when the gradients of a batch are complete. Until `release`."""
        stage = self._stage
        forward = stage.forward_one_chunk
        # What newer versions of torch call in any case, older ones do not have.
        last = "perform_reduce_grad" if hasattr(stage, "perform_reduce_grad") else "scale_grads"
        reduce = getattr(stage, last)

        @functools.wraps(forward)
        def forwarding(*args, **kwargs):
            self.running = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.running = False

        @functools.wraps(reduce)
        def reducing(factor, *args, **kwargs):
            found = reduce(factor, *args, **kwargs)
            self.factor = float(factor)
            reduced()
            return found

        # On this one stage, not on its class.
        vars(stage).update({"forward_one_chunk": forwarding, last: reducing})
        self._watched = ("forward_one_chunk", last)

    def release(self) -> None:
        for name in self.__dict__.pop("_watched", ()):
            vars(self._stage).pop(name, None)
