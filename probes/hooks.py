"""What is hung on a recorded model: hooks that its copies do without, and gradient taps that the compiler traces."""

from collections.abc import Callable

import torch
from torch import Tensor

from probes.edges import add_edges, few, taken
from probes.statistics import add_moments
from probes.torn import note


@torch._dynamo.allow_in_graph
def tap_gradient_in_graph(x: Tensor, row: Tensor, mask: Tensor | None, streams: bool, name: str) -> None:
    # Opaque to dynamo on purpose: where it traces `register_hook` itself, torch 2.13 forgets what the model
    # assigned to attributes of Python objects, and the compiled model computes something else.
    def tap(gradient: Tensor) -> None:
        add_moments(gradient.sum(-2) if streams else gradient, row[0], row[1], mask)

    note(x, name)
    x.register_hook(tap)


@torch._dynamo.allow_in_graph
def tap_edges_in_graph(
    mix: Tensor, row: Tensor, mask: Tensor | None, offset: Tensor, weight: Tensor, *sources: Tensor
) -> None:
    """The same for a depth read, its sources S times [B, T, D] and their weights [S, B, T] (edges.py)."""
    tokens, scale = few(mix, offset), 1.0
    parts = [taken(source, tokens) for source in sources]
    weight, mask = weight.detach().flatten(1), None if mask is None else mask.flatten()
    if tokens is not None:
        weight, mask = weight[:, tokens], None if mask is None else mask[tokens]
        scale = mix.shape[:-1].numel() / len(tokens)

    def tap(gradient: Tensor) -> None:
        add_edges(row, taken(gradient, tokens), parts, weight, mask, scale)

    mix.register_hook(tap)


class Hook:
    """A hook on a module of the recorded model. In a copy or a pickle of that model it does nothing.

    A closure would not do: copies would be recorded too, and pickling fails.
    """

    def __init__(self, action: Callable | None = None):
        self._action = action
        self._eager_action = action and torch._dynamo.disable(action)

    def __call__(self, *values) -> None:
        if self._action is None:
            return
        if torch.compiler.is_compiling():
            self._action(*values)
        else:
            self._eager_action(*values)

    def __deepcopy__(self, memo: dict) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple:
        return Hook, ()


# Where a module is compiled by itself, its own hooks are outside its graph, and the compiler would make a graph of each,
# in which the gradients of what it is given never arrive. Such hooks run as they are; within a larger graph they are
# traced like everything else.
torch._dynamo.eval_frame.skip_code(Hook.__call__.__code__)
