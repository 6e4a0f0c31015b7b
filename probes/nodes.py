"""What one node of a recorded forward does to the tensors it is given."""

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional as F

_ADDING = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SCALING = {
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.itruediv,
    torch.mul,
    torch.div,
    "mul",
    "div",
}
_CASTING = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_KEEPING = {
    torch.clone,
    torch.reshape,
    "contiguous",
    "clone",
    "view",
    "view_as",
    "reshape",
    "reshape_as",
} | _CASTING
_DROPPING = {F.dropout, torch.dropout}
_NORMALISING = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}


def ancestors(node: fx.Node) -> set[fx.Node]:
    """What a node was made from, near and far."""
    found, waiting = set(), list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDING
        and len(node.all_input_nodes) > 1
        and "alpha" not in node.kwargs
    )


def has_matrix(module: nn.Module, recurse: bool = True) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse))


def normalises(node: fx.Node) -> bool:
    """By a function; a module that does is told from its parameters."""
    return node.op == "call_function" and node.target in _NORMALISING


def scales(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in (_SCALING | _DROPPING)


def keeps(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the values come out as they went in; `modules` are those called, by target."""
    if node.op == "call_module":
        return _hands_on(modules[node.target])
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _KEEPING or (node.target in _DROPPING and argument(node, 1, "p", 0.5) == 0.0)


def _hands_on(module: nn.Module) -> bool:
    """An identity, or a dropout that drops nothing."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return False
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0.0
    )


def argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
