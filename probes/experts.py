"""Experts of a layer, and where it is seen which tokens each of them gets. Nothing is known by name.

Two forms are recognised, both beside a router, a matrix with one row for each expert: a list (or dict) of alike modules,
each called with its own tokens; and one module that holds the experts' matrices stacked, [expert, ...], and is called
with the experts of each token, integers [tokens, k] (or a mask [tokens, experts]).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """`count` experts of one layer: a module each, or all in `modules[0]`. `holder` is called with all tokens."""

    count: int
    holder: nn.Module
    modules: tuple[nn.Module, ...]

    @property
    def stacked(self) -> bool:
        return len(self.modules) == 1


def experts_in(modules: Iterable[nn.Module]) -> Experts | None:
    """The first experts in the modules of a layer; None where there are none."""
    for module in modules:
        for holder in module.modules():
            for child in holder.children():
                count = _count(child)
                if count > 1 and _routes(holder, child, count):
                    alone = not isinstance(child, nn.ModuleList | nn.ModuleDict)
                    return Experts(count, holder, (child,) if alone else tuple(child.children()))
    return None


def _count(module: nn.Module) -> int:
    """How many experts a module may hold."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = list(module.children())
        shapes = {tuple(tuple(p.shape) for p in child.parameters()) for child in children}
        return len(children) if len(shapes) == 1 and shapes != {()} else 0
    leading = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3}
    return leading.pop() if len(leading) == 1 else 0


def _routes(holder: nn.Module, experts: nn.Module, count: int) -> bool:
    """Whether there is a matrix beside the experts with one row (or column) for each."""
    inside = {id(p) for p in experts.parameters()}
    return any(id(p) not in inside and p.ndim == 2 and count in p.shape for p in holder.parameters())


def chosen(values: Iterable[object]) -> Tensor | None:
    """Among arguments of stacked experts the integers [tokens, k] that choose them, or a mask [tokens, experts]."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return next((x for x in tensors if x.ndim > 1 and not x.is_floating_point()), None)
