"""Backward passes of a model, and which of them count for a step.

A step's numbers are those of the passes whose gradients its optimizer takes, at the parameters the step began
with. So micro-batches add up; what came before gradients were thrown away (a step that a loss scaler skipped, a
batch the script gave up) does not count; nor does a later evaluation of a closure at other parameters.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, as a recomputation for activation checkpointing is."""
    return backward_id() != -1


def backward_id() -> int:
    """A number for the backward pass that runs in this thread, -1 outside. Not to be traced by a compiler."""
    return torch._C._current_graph_task_id()


class Backwards:
    """Watches the passes while `wanted()`.

    `restart()` is called when all that counted before counts no more, `ended(counts)` at the end of each pass that
    reached a parameter, `astray()` at the end of one that reached none, as for a gradient penalty. `blind()` says that
    parameters may be reached without telling. With `late`, a pass ends after what else waits for its end, as the averaging
    of gradients over processes does.
    """

    def __init__(
        self,
        watched: list[nn.Parameter],
        wanted: Callable[[], bool],
        restart: Callable[[], None],
        ended: Callable[[bool], None],
        astray: Callable[[], None],
        blind: Callable[[], bool] = lambda: False,
        late: bool = False,
    ):
        self._watched, self._blind, self._late = watched, blind, late
        self._wanted, self._restart, self._ended, self._astray = wanted, restart, ended, astray
        self._handles = [p.register_post_accumulate_grad_hook(self._notice) for p in watched]
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self._began_with: list[int] | None = None  # versions of the parameters
        self._left: list[GradientMark | None] = []  # gradients as the last pass left them
        self.counts = True  # whether the last pass did
        self.reached = False  # whether some pass has reached a parameter
        self._closed = False
        # By number, whether they have reached a parameter: passes within passes, where checkpointing is reentrant. A
        # pass that raises never calls back, and is forgotten here.
        self._open: dict[int, bool] = {}
        self._reached = False  # one of them has

    def arrives(self) -> None:
        """A gradient has arrived at a tap."""
        if self._wanted() and backward_id() not in self._open:
            self._begin()

    def close(self) -> None:
        """An optimizer takes the gradients that are there: later passes of this step do not count."""
        self._closed = self._began_with is not None

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self) -> None:
        number = backward_id()
        self._open[number] = False
        queue, end = torch.autograd.Variable._execution_engine.queue_callback, lambda: self._end(number)
        queue((lambda: queue(end)) if self._late else end)

    def _notice(self, parameter: nn.Parameter) -> None:
        number = backward_id()
        # FSDP2 in a pipeline hands gradients over when all passes have ended (pipeline.py).
        if number == -1 or not self._wanted() or self._open.get(number):
            return
        if number not in self._open:
            self._begin()
        self._open[number] = self._reached = self.reached = True
        self.counts = not self._closed and self._began_with in (None, self._versions())
        if self.counts and self._thrown_away(parameter):
            self._restart()

    def _end(self, number: int) -> None:
        reached = self._open.pop(number, None)
        if reached is None:  # a step was completed within the pass
            self._ended(self.counts)
            return
        if self._open and not reached:
            return  # the pass around it will tell
        if not reached and not self._reached:
            if not self._blind():
                self._astray()
                return
            self.counts = not self._closed and self._began_with in (None, self._versions())
            reached = self.reached = True
        if not self._open:
            self._reached = False
        if reached and self.counts:
            self._began_with = self._versions()
            self._left = [GradientMark.of(p.grad) for p in self._watched]
        self._ended(self.counts)

    def _versions(self) -> list[int]:
        return [p._version for p in self._watched]

    def _thrown_away(self, accumulated: nn.Parameter) -> bool:
        """Whether all gradients of the last pass were replaced or changed before this one added to them."""
        marks = [
            # The gradient that just arrived was added in place, which is one change.
            mark.changed(p.grad, 1 if p is accumulated else 0)
            for p, mark in zip(self._watched, self._left, strict=False)
            if mark is not None
        ]
        return bool(marks) and all(marks)


class GradientMark:
    """A gradient as it was at one moment, without keeping it alive."""

    def __init__(self, gradient: Tensor):
        self._gradient, self._version = weakref.ref(gradient), gradient._version

    @classmethod
    def of(cls, gradient: Tensor | None) -> "GradientMark | None":
        return None if gradient is None else cls(gradient)

    def changed(self, gradient: Tensor | None, expected: int = 0) -> bool:
        """Whether `gradient` is another tensor, or has been written to other than `expected` times."""
        same = gradient is not None and self._gradient() is gradient
        return not same or gradient._version != self._version + expected
