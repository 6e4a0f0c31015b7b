"""The stages of a pipeline that this process trains, as torch.distributed.pipelining runs them.

A schedule tries a stage once on tensors that hold anything, sends micro-batches through it, and when the last backward pass
has ended brings the gradients together and divides them. Only its own calls tell which of these is going on.
"""

import functools
import sys
from collections.abc import Callable, Iterator

from torch import nn

from probes.manifest import RunError


class Stage:
    """Stage `index` of `count`, which are shared out over `processes`. `running` is whether a micro-batch goes through it;
    `factor` is what the schedule divided the gradients by last, for each micro-batch has a loss of its own."""

    def __init__(self, stage, processes: int):
        self._stage = stage
        self.module: nn.Module = stage.submod
        self.index, self.count, self.processes = stage.stage_index, stage.num_stages, processes
        self.running = False
        self.factor = 1.0

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


def reads_in(stage: nn.Module) -> RunError:
    """What to raise for a stage with depth reads."""
    return RunError(
        f"{type(stage).__name__} is a stage of a pipeline with depth reads or marks: what crosses to the next stage is a stack of "
        "sources and no state, and depthscope records the stages of plain residual streams alone. Train a model with depth "
        "reads under DistributedDataParallel, fully_shard or parallelize_module to record it."
    )


def stages_of(model: object) -> list[Stage]:
    """Those of a schedule, or a stage by itself; none of a module. Raises RunError for a schedule that cannot be followed."""
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    stages = sys.modules.get("torch.distributed.pipelining.stage")
    if schedules is None or stages is None:
        return []
    if isinstance(model, stages._PipelineStageBase):
        return [Stage(model, model.group_size)]
    if not isinstance(model, schedules._PipelineSchedule):
        return []
    if any(action.computation_type == schedules.BACKWARD_INPUT for action in _actions(model)):
        raise RunError(
            f"{type(model).__name__} takes the gradients of inputs and of parameters in passes of their own, which depthscope "
            "cannot follow: take a schedule with whole backward passes, as Schedule1F1B or ScheduleInterleaved1F1B."
        )
    held = getattr(model, "_stages", None) or [model._stage]
    return [Stage(stage, stage.group_size) for stage in sorted(held, key=lambda stage: stage.stage_index)]


def _actions(schedule) -> Iterator:
    """What a schedule that is written down does, in all processes."""
    for actions in getattr(schedule, "pipeline_order", {}).values():
        for action in filter(None, actions):
            yield from getattr(action, "sub_actions", None) or [action]
