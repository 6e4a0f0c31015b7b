"""How taps hang on modules: at which places and calls, whether anybody looks, what failing and running cost."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.backwards import in_backward
from probes.faults import Faults
from probes.gradient_taps import GradientTaps
from probes.hooks import Hook
from probes.parallel import is_parallel
from probes.sites import Place
from probes.tally import ACTIVATIONS


class Hanging:
    """Hooks that call an action while a training forward is `live`; a base for what is done with the tensors.

    One object holds all of it, for what compiled code reads should be few steps away.
    """

    def __init__(self, faults: Faults):
        self.live = False  # inside a training forward that is looked at
        self.recomputing = False
        self.gradients = GradientTaps(faults)
        self._faults = faults
        self._seconds = 0.0  # host time inside eager taps of forwards
        self._turns: dict[int, int] = {}  # calls so far in this forward, of modules that run several times
        self._turns_of: list[int] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def seconds(self) -> float:
        """Host time spent inside eager taps in this step."""
        return self._seconds + self.gradients.seconds

    def detach(self) -> None:
        """Take every hook off the model."""
        while self._handles:
            self._handles.pop().remove()

    def at(self, place: Place, action: Callable[[Tensor], None]) -> None:
        """Call `action` with the tensor at `place`."""
        if place.turn is not None:
            action = self._in_turn(place.turn, action)
        if place.is_input:
            self.before(place.module, lambda args, kwargs: action(place.given(args, kwargs)))
        else:
            self.after(place.module, lambda args, kwargs, output: action(place.made(output)))

    def before(self, module: nn.Module, action: Callable) -> None:
        """Call `action(args, kwargs)` before each call of `module`."""

        def hook(module, args, kwargs):
            if self.wants():
                self.timed(action, args, kwargs)

        # Before what makes a DTensor of it: that is no longer what the stream holds.
        self._handles.append(
            module.register_forward_pre_hook(Hook(hook), with_kwargs=True, prepend=is_parallel(module))
        )

    def after(self, module: nn.Module, action: Callable) -> None:
        """Call `action(args, kwargs, output)` after each call of `module`."""

        def hook(module, args, kwargs, output):
            if self.wants():
                self.timed(action, args, kwargs, output)

        self._handles.append(module.register_forward_hook(Hook(hook), with_kwargs=True))

    def _in_turn(self, turn: int, action: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """`action` at the `turn`-th call in a forward. Recomputations come in another order, so they do not count."""
        key = len(self._turns_of)
        self._turns_of.append(key)

        def counted(x: Tensor) -> None:
            if self.recomputing and not torch.compiler.is_compiling():
                return
            now = self._turns.get(key, 0)
            self._turns[key] = now + 1
            if now == turn:
                action(x)

        return counted

    def wants(self) -> bool:
        """Whether to look here and now: in a training forward, or where it is recomputed with the graph that the
        first time lacked (reentrant activation checkpointing)."""
        if self.live or torch.compiler.is_compiling():
            return self.live
        self.recomputing = self.gradients.owing and torch.is_grad_enabled() and in_backward()
        return self.recomputing

    def timed(self, action: Callable, *values) -> None:
        if torch.compiler.is_compiling():
            action(*values)
            return
        started = time.perf_counter()
        # What an action does not know by itself could be anything.
        self.eagerly(lambda: action(*values), *ACTIVATIONS)
        self._seconds += time.perf_counter() - started
        self.recomputing = False

    def eagerly(self, action: Callable, *metrics: str) -> None:
        """Do something outside compiled code; if it fails, those metrics are lost and nothing else."""
        try:
            action()
        except Exception as error:
            self._faults.caught(error, *metrics)
