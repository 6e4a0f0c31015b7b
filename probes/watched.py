"""What training runs in this process, and what is watched of it: one model, or stages of a pipeline, each by itself.

Taps see the forwards of one module, and gradients and updates are those of its parameters. What counts for a step is decided
by each module's own backward passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.backwards import Backwards
from probes.clock import Clock
from probes.edges import EDGE_METRICS
from probes.faults import Faults
from probes.gradients import NORMS, GradientNorms
from probes.hooks import Hook
from probes.masks import Masks
from probes.parallel import Parallel
from probes.pipeline import Stage
from probes.scaling import LossScale
from probes.selfcheck import SelfCheck
from probes.sites import Sites
from probes.statistics import DEPTH_METRICS
from probes.tally import ACTIVATIONS
from probes.taps import MATRICES, OFF, Taps
from probes.updates import UPDATE_RATIO, Updates
from probes.vocabulary import GRADIENTS, METRICS


@dataclass(frozen=True)
class Part:
    """A module that training calls: the model, or one `stage` of it. `parallel` is how it is spread over processes."""

    sites: Sites
    masks: Masks
    parallel: Parallel | None = None
    stage: Stage | None = None


class Watched:
    """One part. Where `merged`, its sums are added to those of other processes, of which `senders` send a sample."""

    def __init__(
        self, part: Part, faults: Faults, scale: LossScale, clock: Clock, merged: bool, senders: int
    ):
        self.part, self._faults, self._scale, self._clock = part, faults, scale, clock
        self._shared = part.parallel if merged else None
        copies = part.parallel.copies if merged else 1
        self.taps = Taps(part.sites, part.masks, faults, senders, copies, part.stage)
        self.skipped: Tensor | None = None  # attempts at this step that the scaler skipped
        self._watch_parameters()
        self._hooks = []
        if part.parallel is not None and not part.parallel.known:
            look = Hook(lambda *_: None if torch.compiler.is_compiling() else part.parallel.look())
            self._hooks.append(part.sites.called.register_forward_pre_hook(look))
        if part.stage is not None:
            part.stage.watch(self._reduced)

    def detach(self) -> None:
        self.taps.detach()
        self.backwards.detach()
        for hook in self._hooks:
            hook.remove()
        if self.part.stage is not None:
            self.part.stage.release()

    def begin(self) -> None:
        """The step that was looked at is complete; another begins."""
        self.taps.reset()
        self.taps.follow()
        self.gradients.reset()
        self.backwards.reset()
        if self.gradients.replaced():
            self.backwards.detach()
            self._watch_parameters()
        self.skipped = None

    def measured(self, attempt: int) -> dict[str, Tensor]:
        """The metrics of this step, gradients as they are; without those that failed."""
        metrics = self.taps.finish() | self.gradients.finish(self._scale.value)
        with self._faults.guard(UPDATE_RATIO):
            metrics |= self.updates.after(attempt)
        if self.part.stage is not None:
            factor = self.part.stage.factor
            metrics |= {name: x / factor for name, x in metrics.items() if name.endswith("_grad_rms")}
        return metrics

    def _watch_parameters(self) -> None:
        sites, parallel, taps = self.part.sites, self.part.parallel, self.taps
        self.gradients, self.updates = GradientNorms(sites, self._shared), Updates(sites, self._shared)
        self.backwards = Backwards(
            self.gradients.watched(),
            lambda: taps.mode != OFF,
            self._restart,
            self._backward_ended,
            taps.forget_gradients,
            blind=lambda: parallel is not None and parallel.holds_back,
            late=parallel is not None,
        )
        taps.gradients.arrives = self.backwards.arrives

    def _backward_ended(self, counts: bool) -> None:
        with self._faults.guard(*ACTIVATIONS, *DEPTH_METRICS, *EDGE_METRICS):
            if not counts:
                self.taps.drop()
                return
            self.taps.commit()
        if self.part.stage is None:
            self._measure()

    def _reduced(self) -> None:
        """The gradients of all micro-batches of a pipeline are complete."""
        if self.taps.mode != OFF and self.taps.seen and self.backwards.counts:
            self._measure()

    def _measure(self) -> None:
        with self._faults.guard(*NORMS):
            # Parameters change slowly, and reading them all takes as long as reading all gradients.
            self.gradients.measure(parameters=self.taps.mode == MATRICES)
            with self._faults.guard(UPDATE_RATIO):
                self.updates.before(self._clock.now.attempt)
        with self._faults.guard(*GRADIENTS):
            if self.gradients.squares is not None:
                self._scale.at_backward(self.gradients.squares)

    def _restart(self) -> None:
        with self._faults.guard(*METRICS):
            self.taps.restart()
            if self._scale.given:
                lost = (~self.gradients.finite()).float()
                self.skipped = lost if self.skipped is None else self.skipped + lost


class Watch:
    """All that one process trains. `mode` is what is looked at: set it between steps."""

    def __init__(
        self,
        parts: Sequence[Part],
        faults: Faults,
        scale: LossScale,
        clock: Clock,
        merged: bool = False,
        senders: int = 1,
    ):
        self._scale = scale
        self._each = [Watched(part, faults, scale, clock, merged, senders) for part in parts]

    def __iter__(self) -> Iterator[Watched]:
        return iter(self._each)

    @property
    def first(self) -> Watched:
        """The one there is, but for a pipeline with several stages in this process."""
        return self._each[0]

    @property
    def mode(self) -> int:
        return self.first.taps.mode

    @mode.setter
    def mode(self, mode: int) -> None:
        for each in self:
            each.taps.mode = mode

    @property
    def seen(self) -> bool:
        """Whether a training forward has begun since the last optimizer step."""
        return any(each.taps.seen for each in self)

    @property
    def half(self) -> bool:
        """Whether a training forward ran under float16 autocast."""
        return any(each.taps.half for each in self)

    @property
    def seconds(self) -> float:
        """Host seconds that the taps of this step have taken."""
        return sum(each.taps.seconds for each in self)

    @property
    def nbytes(self) -> int:
        """Memory held on the device between steps, in bytes."""
        return sum(each.taps.nbytes + each.updates.nbytes for each in self)

    @property
    def skipped(self) -> Tensor | None:
        """Attempts at this step that the scaler skipped, float32 []; None where none is known."""
        found = [each.skipped for each in self if each.skipped is not None]
        return torch.stack(found).max() if found else None

    def take(self, optimizer: torch.optim.Optimizer, now: Tensor | None) -> None:
        """The optimizer is about to take the gradients, with the loss scale `now` in them."""
        for each in self:
            if each.backwards.counts:
                each.gradients.take(optimizer, self._scale.value, now)

    def close(self) -> None:
        """Later backward passes of this step do not count."""
        for each in self:
            each.backwards.close()

    def begin(self, selfcheck: SelfCheck) -> None:
        """The step that was looked at is complete; another begins."""
        for each in self:
            selfcheck.step(each.taps, each.backwards.reached)
            each.begin()

    def forget(self) -> None:
        """Nothing counts of what was measured since the last recorded step."""
        for each in self:
            each.taps.tally.reset()
            each.gradients.reset()

    def advance(self) -> None:
        for each in self:
            each.taps.seen = False

    def detach(self) -> None:
        """Take everything off what is watched."""
        for each in self:
            each.detach()
