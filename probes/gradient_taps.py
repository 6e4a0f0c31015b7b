"""Gradient taps of eager forwards: a hook on a tensor that sums up its gradient when it arrives."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probes.faults import Faults
from probes.passes import Passes
from probes.statistics import add_moments

# The gradient tapped last, its version, its mask and what was summed up of it.
_NONE = (None, None, None, None)


def _nobody() -> None:
    pass


class GradientTaps:
    """`tap` hooks a tensor; `reset` begins a step. What has no graph yet, in reentrant activation checkpointing, is
    owed: its row is tapped when it is computed again."""

    def __init__(self, faults: Faults):
        self.arrives: Callable[[], None] = _nobody  # told of each gradient
        self._faults = faults
        self._owed: set[tuple[str, int]] = set()
        # Hooks of leaves, which outlive the graph, by what they are for; each with its leaf, so that ids stay unique.
        self._leaves: dict[tuple, tuple[Tensor, torch.utils.hooks.RemovableHandle]] = {}
        self.reset()

    @property
    def owing(self) -> bool:
        return bool(self._owed)

    def owes(self, place: str, row: int) -> bool:
        return (place, row) in self._owed

    def reset(self) -> None:
        self.seconds = 0.0  # host time inside the taps
        self._owed.clear()
        for key in list(self._leaves):
            self._leave(key)
        self.forget_newest()

    def forget_newest(self) -> None:
        self._newest = _NONE

    def tap(
        self,
        x: Tensor,
        sums: Tensor,
        mask: Tensor | None,
        passes: Passes,
        row: tuple[str, int],
        metrics: Sequence[str],
        streams: bool = False,
    ) -> None:
        """Add the moments of the gradient of `x` to `sums` [2] when it comes, of the tokens in `mask`.

        With `streams`, `x` [..., n, D] are copies of a tensor whose gradient is meant: the sum of theirs.
        """

        def add(gradient: Tensor) -> None:
            sums.add_(self._moments_of(gradient.sum(-2) if streams else gradient, mask))

        self.watch(x, passes, row, metrics, add)

    def watch(
        self,
        x: Tensor,
        passes: Passes,
        row: tuple[str, int],
        metrics: Sequence[str],
        action: Callable[[Tensor], None],
    ) -> None:
        """Hand the gradient of `x` to `action` when it comes. `row` says which (place, row) that is; `metrics` are lost
        where it fails."""
        if not x.requires_grad:
            if not torch.is_grad_enabled():
                self._owed.add(row)
            return
        this = passes.now
        this.watched = True

        def arrived(gradient: Tensor) -> None:
            started = time.perf_counter()
            self.arrives()
            # A recomputation that follows is this pass's.
            passes.now, this.reached = this, True
            with self._faults.guard(*metrics):
                action(gradient)
            self.seconds += time.perf_counter() - started

        hook = x.register_hook(arrived)
        if x.is_leaf:
            # It may be given to the model again, as what a stage of a pipeline receives into.
            key = id(x), row, tuple(metrics)
            self._leave(key)
            self._leaves[key] = x, hook

    def _leave(self, key: tuple) -> None:
        if key in self._leaves:
            self._leaves.pop(key)[1].remove()

    def _moments_of(self, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """[squares, count] of a gradient. In a plain residual a layer's output and the state after it have one and the
        same, which is read once."""
        newest, version, its_mask, moments = self._newest
        if gradient is not newest or gradient._version != version or mask is not its_mask:
            moments = torch.zeros(2, device=gradient.device)
            add_moments(gradient.detach(), moments[0], moments[1], mask)
            self._newest = gradient, gradient._version, mask, moments
        return moments
