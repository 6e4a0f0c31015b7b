"""What is hung on a recorded model: hooks that its copies do without, and gradient taps that the compiler traces."""

from collections.abc import Callable

import torch
from torch import Tensor

from probes.statistics import add_moments


@torch._dynamo.allow_in_graph
def tap_gradient_in_graph(x: Tensor, row: Tensor, mask: Tensor | None = None) -> None:
    # Opaque to dynamo on purpose: where it traces `register_hook` itself, torch 2.13 forgets what the model
    # assigned to attributes of Python objects, and the compiled model computes something else.
    def tap(gradient: Tensor) -> None:
        add_moments(gradient, row[0], row[1], mask)

    x.register_hook(tap)


class Hook:
    """A hook on a module of the recorded model. In a copy or a pickle of that model it does nothing.

    A closure would not do: copies would be recorded too, and pickling fails.
    """

    def __init__(self, action: Callable | None = None):
        self._action = action

    def __call__(self, *values) -> None:
        if self._action is not None:
            self._action(*values)

    def __deepcopy__(self, memo: dict) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple:
        return Hook, ()
