"""How a tensor that no module is given or returns is made of some that are: cheap operations of one forward, as a
function. A state that a gate leaves and a norm that is no module reads, say."""

import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from probes.flow import Call
from probes.nodes import keeps
from probes.symbols import Recording, Untraceable

_PURE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
}
_CHEAP = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.getitem),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.lerp, torch.addcmul),
    *(torch.rsqrt, torch.sqrt, torch.square, torch.mean, torch.var, torch.sum, torch.clamp),
    *(torch.sigmoid, torch.tanh, torch.relu, torch.exp, F.sigmoid, F.tanh, F.relu, F.softplus, F.silu),
    *(F.rms_norm, F.layer_norm, torch.rms_norm, torch.layer_norm, F.normalize),
    *(torch.clone, torch.reshape, torch.unsqueeze, torch.chunk, torch.split),
    *("add", "sub", "mul", "div", "neg", "pow", "lerp", "addcmul", "rsqrt", "sqrt", "square", "mean", "var", "sum"),
    *("clamp", "clamp_min", "sigmoid", "tanh", "relu", "exp", "clone", "contiguous", "view", "view_as", "reshape"),
    *("unsqueeze", "squeeze", "chunk", "split", "expand", "expand_as", "to", "type", "type_as", "float", "half"),
    *("bfloat16", "double"),
}  # fmt: skip
"""What may be computed a second time. Nothing random, and nothing that takes as long as a layer."""
_PRODUCTS = {torch.einsum, torch.matmul, operator.matmul, "matmul"}
_FEW = 64  # elements of a parameter, of which a product takes no time


@dataclass(frozen=True)
class Given:
    """What a call is given, as a leaf."""

    call: Call


@dataclass(frozen=True)
class Recipe:
    """`run(*leaves, *held)` is the tensor. A leaf is an argument of the forward, by position and name, or what a call
    returned or was given; the last one to be seen is the last. `held` are parameters and buffers by name, each with the (size, stride,
    offset) of the part of it that is used, or None."""

    run: Callable[..., Tensor]
    leaves: tuple[tuple[int, str] | Call | Given, ...]
    held: tuple[tuple[str, tuple | None], ...]


class _Unmade(Exception):
    """Nothing cheap makes it."""


class Recipes:
    """Recipes of nodes of one recording; `twin` records the same forward with tensors of other sizes."""

    def __init__(self, recording: Recording, twin: Callable[[], Recording]):
        self._recording, self._record_twin = recording, twin
        self._modules = {name: module for module, name in recording.names.items()}
        self._nodes = list(recording.graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        called = [node.target for node in self._nodes if node.op == "call_module"]
        self._once = {target for target in called if called.count(target) == 1}
        self._receivers: dict[fx.Node, tuple[fx.Node, Call]] = {}
        for node in (n for n in self._nodes if n.op == "call_module" and n.target in self._once):
            for key, given in enumerate(node.args):
                if isinstance(given, fx.Node):
                    told = Call(node.target, self._modules[node.target], key)
                    self._receivers.setdefault(given, (node, told))
        self._twin: list[fx.Node] | None = None
        self._given_first = False  # whether what a call is given is a leaf, even if it could be computed
        self._other = recording.shape  # that of the twin

    def of(self, node: fx.Node) -> Recipe | None:
        """That of a node; None where there is none."""
        try:
            if self._twin is None:
                twin = self._record_twin()
                self._twin, self._other = list(twin.graph.nodes), twin.shape
            if [n.target for n in self._twin] != [n.target for n in self._nodes]:
                return None
        except Untraceable:
            return None
        for self._given_first in (False, True):
            with suppress(_Unmade):
                return self._made(node)
        return None

    def _made(self, node: fx.Node) -> Recipe:
        inside = self._inside(node)
        leaves = sorted((n for n in inside if self._is_leaf(n) or self._is_given(n)), key=self._seen)
        held = [n for n in inside if n.op == "get_attr"]
        if not leaves:
            raise _Unmade
        self._check_writes(set(inside), self._seen(leaves[-1]))
        graph = fx.Graph()
        copies = {leaf: graph.placeholder(f"leaf_{i}") for i, leaf in enumerate(leaves)}
        copies |= {each: graph.placeholder(f"held_{i}") for i, each in enumerate(held)}
        stream = self._recording.stream
        like = copies[stream if stream in leaves else leaves[0]]
        for each in inside:
            if each not in copies:
                copies[each] = self._copied(graph, each, copies, like)
        graph.output(copies[node])
        graph.eliminate_dead_code()
        run = fx.GraphModule(nn.Module(), graph).forward
        return Recipe(run, tuple(map(self._leaf, leaves)), tuple(map(self._held, held)))

    def _held(self, node: fx.Node) -> tuple[str, tuple | None]:
        """A parameter or buffer, or which part of it a constant is that the recording met."""
        names = {id(p): name for name, p in self._recording.root.named_parameters()}
        names |= {id(b): name for name, b in self._recording.root.named_buffers()}
        if node.target in names.values():
            return node.target, None
        constant = next((x for x, name in self._recording.tensor_attrs.items() if name == node.target), None)
        whole = names.get(id(getattr(constant, "_base", None)))
        if whole is None:
            raise _Unmade  # what was made of parameters is not the same after their next update
        return whole, (tuple(constant.shape), constant.stride(), constant.storage_offset())

    def _inside(self, node: fx.Node) -> list[fx.Node]:
        """What is to be computed, from the leaves on, in order."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if each in found:
                continue
            found.add(each)
            if self._is_leaf(each) or each.op == "get_attr":
                continue
            if self._is_given(each):
                continue
            if not self._is_cheap(each):
                raise _Unmade
            waiting += each.all_input_nodes
        return sorted(found, key=self._position.get)

    def _is_cheap(self, node: fx.Node) -> bool:
        few = node.target in _PRODUCTS and any(map(self._is_small, node.all_input_nodes))
        return few or self._hands_on(node) or node.target in _CHEAP | set(_PURE)

    def _is_small(self, node: fx.Node) -> bool:
        if node.op != "get_attr":
            return False
        known = {name: x for x, name in self._recording.tensor_attrs.items()}
        known |= dict(self._recording.root.named_parameters())
        return node.target in known and known[node.target].numel() <= _FEW

    def _is_given(self, node: fx.Node) -> bool:
        """Whether it is a leaf that a call is given."""
        if node.op == "get_attr" or self._is_leaf(node):
            return False
        return node in self._receivers and (self._given_first or not self._is_cheap(node))

    def _seen(self, node: fx.Node) -> int:
        """When a leaf is seen."""
        return self._position[self._receivers[node][0] if self._is_given(node) else node]

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether it is the call of a module that only hands on what it is given."""
        return node.op == "call_module" and keeps(node, self._modules)

    def _is_leaf(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        call, key = _part(node)
        if call.op != "call_module" or self._hands_on(call):
            return False
        if call.target not in self._once:
            raise _Unmade
        return call is node or key is not None

    def _leaf(self, node: fx.Node) -> tuple[int, str] | Call | Given:
        if self._is_given(node):
            return Given(self._receivers[node][1])
        if node.op == "placeholder":
            return self._recording.positions.index(node.target), node.target
        call, key = _part(node)
        return Call(call.target, self._modules[call.target], key or 0)

    def _check_writes(self, inside: set[fx.Node], last: int) -> None:
        """What is overwritten before the last leaf is there, is another by then."""
        for node in self._nodes[:last]:
            writes = node.target in _PURE or (isinstance(node.target, str) and node.target.endswith("_"))
            if writes and node.op != "call_module" and inside & {node, *node.all_input_nodes}:
                raise _Unmade

    def _copied(self, graph: fx.Graph, node: fx.Node, copies: dict, like: fx.Node) -> fx.Node:
        if node.op == "call_module":
            return copies[node.all_input_nodes[0]]
        twin = self._twin[self._position[node]]

        def mapped(value: object, other: object) -> object:
            if isinstance(value, fx.Node):
                return copies[value]
            if isinstance(value, tuple | list):
                return type(value)([mapped(*pair) for pair in zip(value, other, strict=True)])
            if isinstance(value, dict):
                return {key: mapped(each, other[key]) for key, each in value.items()}
            if isinstance(value, slice):
                parts = ("start", "stop", "step")
                return slice(*(mapped(getattr(value, part), getattr(other, part)) for part in parts))
            if value == other:
                return value
            sizes = self._recording.shape, self._other
            axes = [axis for axis in (-1, 0, 1) if (value, other) == tuple(shape[axis] for shape in sizes)]
            if not axes:
                raise _Unmade
            return graph.call_method("size", (like, axes[0]))

        args, kwargs = mapped(node.args, twin.args), mapped(node.kwargs, twin.kwargs)
        return graph.create_node(node.op, _PURE.get(node.target, node.target), tuple(args), kwargs)


def _part(node: fx.Node) -> tuple[fx.Node, int | None]:
    """A call and which of the things it returns a node is; any other node as it is."""
    if node.op == "call_function" and node.target is operator.getitem:
        call, key = node.args
        if isinstance(call, fx.Node) and call.op == "call_module" and isinstance(key, int):
            return call, key
    return node, None
