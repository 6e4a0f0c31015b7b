"""Follow the stream through a forward without running it.

The forward is executed once on symbols, its children left closed, so that what it adds to the state it was given, and
what each child receives, can be read off the record. Nothing is computed, nothing is left behind, and no name of a
class or package matters.
"""

import operator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from probes.symbols import Recording, Untraceable, argument

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

_OPENED = 16  # children opened at most where the forward hands them the stream to add to


@dataclass(frozen=True)
class Call:
    """One call of a child, `name` below the traced module; `key` and `keyword` say which argument carried the tensor
    (position or name), or `key` which element of its output it is."""

    name: str
    module: nn.Module
    key: int = 0
    keyword: str | None = None


@dataclass(frozen=True)
class Term:
    """What one layer adds to the stream.

    `calls` made it, first to last, with `parameters` used beside them. `state` is the call that receives the state it
    is made from (None: no call does, or it is the traced module's own input), which sums the input and the first
    `given` terms. `tail` is the call whose output is added as it is; None when something comes between, as a gate does.
    """

    calls: tuple[Call, ...]
    parameters: tuple[nn.Parameter, ...]
    state: Call | None
    given: int
    tail: Call | None


@dataclass(frozen=True)
class Flow:
    """The stream through one forward: the name of the argument that carries it, what is added in order, and what else
    happens to it (`change`, empty for a plain sum). `norm` is a last call that only normalises what is handed on."""

    argument: str
    terms: tuple[Term, ...]
    change: str
    norm: Call | None


def follow(module: nn.Module) -> Flow:
    """The stream through `module.forward`, which is its first argument. Untraceable where it cannot be followed."""
    flow = _followed(module, optional=False)
    called = {child for term in flow.terms for call in term.calls for child in call.module.modules()}
    if any(child not in called and _has_matrix(child, recurse=False) for child in module.modules()):
        # Cross-attention, say, runs only where the optional argument that it attends to is given.
        with suppress(Untraceable):
            other = _followed(module, optional=True)
            return max(flow, other, key=lambda each: len(each.terms))
    return flow


def _followed(module: nn.Module, optional: bool) -> Flow:
    opened = {module}
    while True:
        recording = Recording(module, opened, optional)
        try:
            return _Reading(recording).flow()
        except _Closed as closed:
            if len(opened) > _OPENED:
                raise Untraceable(
                    f"{closed.call.name} changes the stream in a way that was not followed"
                ) from None
            opened.add(closed.call.module)


class _Closed(Exception):
    """The stream goes into a closed child and comes out of it."""

    def __init__(self, call: Call):
        super().__init__(call.name)
        self.call = call


@dataclass
class _Path:
    """How the stream came to a node: by which nodes, the terms added so far, and what else happened on the way."""

    trunk: list[fx.Node]
    terms: list[fx.Node] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    norm: fx.Node | None = None  # the last thing that happened, where it was a norm


class _Reading:
    """Reads the record of one forward backwards, from its result to its input."""

    def __init__(self, recording: Recording):
        self._recording = recording
        self._module = {name: module for module, name in recording.names.items()}
        self._paths: dict[fx.Node, _Path | None] = {}
        self._called = [node.target for node in recording.graph.nodes if node.op == "call_module"]

    def flow(self) -> Flow:
        path = self._path(self._recording.result)
        if path is None:
            raise Untraceable("what it returns is not its input with something added")
        self._trunk = set(path.trunk)
        terms = self._ordered(path.terms)
        if not terms:
            raise Untraceable("it adds nothing to its input")
        changes = path.changes if path.norm is None else path.changes[:-1]
        change = "; ".join(dict.fromkeys(changes))
        return Flow(self._recording.argument, tuple(terms), change, path.norm and self._received(path.norm))

    # The stream

    def _path(self, node: fx.Node) -> _Path | None:
        """How the stream leads to `node`; None where it does not."""
        if node not in self._paths:
            self._paths[node] = self._find_path(node)
        return self._paths[node]

    def _find_path(self, node: fx.Node) -> _Path | None:
        node = self._stripped(node)
        if node is self._recording.stream:
            return _Path([node])
        if _is_sum(node):
            return self._sum_path(node)
        if node.op == "call_function" and node.target in _NORMALISING:
            return self._changed(node, node.args[0], "normalised", None)
        if node.op in ("call_function", "call_method") and node.target in (_SCALING | _DROPPING):
            inputs = [n for n in node.all_input_nodes if self._attempted(n) is not None]
            return self._changed(node, inputs[0], "scaled", None) if inputs else None
        call = node.args[0] if node.op == "call_function" and node.target is operator.getitem else node
        if isinstance(call, fx.Node) and call.op == "call_module":
            return self._call_path(call)
        return None

    def _attempted(self, node: fx.Node) -> _Path | None:
        try:
            return self._path(node)
        except _Closed:
            return None

    def _sum_path(self, node: fx.Node) -> _Path | None:
        """The addend that the stream leads to, and the others as terms."""
        best, closed = None, None
        addends = self._addends(node)
        for addend in addends:
            try:
                path = self._path(addend)
            except _Closed as error:
                closed = closed or error
                continue
            if path is not None and (best is None or len(path.terms) > len(best[1].terms)):
                best = addend, path
        if best is None:
            if closed is not None:
                raise closed
            return None
        stream, path = best
        others = [addend for addend in addends if addend is not stream]
        return _Path([*path.trunk, node], [*path.terms, *others], path.changes)

    def _addends(self, node: fx.Node) -> list[fx.Node]:
        """What a sum adds up, left to right; sums within it that nothing else uses are taken apart."""
        found = []
        for each in node.all_input_nodes:
            inner = self._stripped(each)
            found += self._addends(inner) if _is_sum(inner) and len(inner.users) == 1 else [each]
        return found

    def _call_path(self, node: fx.Node) -> _Path | None:
        module = self._module[node.target]
        inputs = [n for n in node.all_input_nodes if self._attempted(n) is not None]
        if not inputs:
            # A closed child may hide the way: it says so itself.
            for each in node.all_input_nodes:
                self._path(each)
            return None
        if not _has_matrix(module):
            norm = node if next(module.parameters(), None) is not None else None
            return self._changed(node, inputs[0], f"changed by {node.target}", norm)
        raise _Closed(Call(node.target, module))

    def _changed(self, node: fx.Node, before: fx.Node, what: str, norm: fx.Node | None) -> _Path | None:
        path = self._path(before)
        return path and _Path([*path.trunk, node], path.terms, [*path.changes, what], norm)

    def _stripped(self, node: fx.Node) -> fx.Node:
        """The node behind operations that leave the values as they are."""
        while True:
            inputs = node.all_input_nodes
            if not inputs:
                return node
            if node.op in ("call_function", "call_method"):
                keeps = node.target in _KEEPING
                keeps |= node.target in _DROPPING and argument(node, 1, "p", 0.5) == 0.0
            else:
                keeps = node.op == "call_module" and _keeps(self._module[node.target])
            if not keeps:
                return node
            node = inputs[0]

    # The terms

    def _ordered(self, nodes: list[fx.Node]) -> list[Term]:
        """The terms, each after those that its state sums."""
        position = {node: index for index, node in enumerate(self._recording.graph.nodes)}
        made = [(node, self._made_from(node)) for node in nodes]
        made = [(node, back) for node, back in made if back is not None]
        made.sort(key=lambda each: (len(each[1].included), position[each[0]]))
        return [self._term(node, back) for node, back in made]

    def _made_from(self, term: fx.Node) -> "_Back | None":
        """Everything between a term and the states it was made from; None for one made without the stream."""
        back = _Back()
        waiting = [term]
        while waiting:
            each = waiting.pop()
            if each in back.nodes:
                continue
            if self._is_state(each):
                back.states.append(each)
                back.included |= set(self._path(each).terms)
                continue
            back.nodes.add(each)
            waiting += each.all_input_nodes
        return back if back.states else None

    def _is_state(self, node: fx.Node) -> bool:
        node = self._stripped(node)
        if node in self._trunk or not _is_sum(node):
            return node in self._trunk
        # The same sum may be written twice; what only looks like one, as a shift after a norm, has left the stream.
        path = self._attempted(node)
        return path is not None and all(each in self._trunk or _is_sum(each) for each in path.trunk)

    def _term(self, node: fx.Node, back: "_Back") -> Term:
        inside = [n for n in self._recording.graph.nodes if n in back.nodes]
        calls = tuple(Call(n.target, self._module[n.target]) for n in inside if n.op == "call_module")
        root = self._recording.root
        names = [n.target for n in inside if n.op == "get_attr"]
        parameters = tuple(root.get_parameter(n) for n in names if n in dict(root.named_parameters()))
        states = {s for s in back.states if set(self._path(s).terms) == back.included}
        receivers = [n for n in inside if n.op == "call_module" and states & set(n.all_input_nodes)]
        received = next(filter(None, map(self._received, receivers)), None)
        return Term(calls, parameters, received, len(back.included), self._tail(node))

    def _tail(self, node: fx.Node) -> Call | None:
        node, key = self._stripped(node), 0
        if node.op == "call_function" and node.target is operator.getitem:
            node, key = node.args
            if not isinstance(
                key, int
            ):  # a slice of a tensor, as of a joint attention's, is not what the call returns
                return None
            node = self._stripped(node) if isinstance(node, fx.Node) else node
        if not isinstance(node, fx.Node) or node.op != "call_module" or self._called.count(node.target) > 1:
            return None
        return Call(node.target, self._module[node.target], key)

    def _received(self, node: fx.Node) -> Call | None:
        """The call and the argument by which it receives the stream; None where it is called more than once."""
        if self._called.count(node.target) > 1:
            return None
        for key, value in enumerate(node.args):
            if isinstance(value, fx.Node) and self._is_state(value):
                return Call(node.target, self._module[node.target], key)
        for keyword, value in node.kwargs.items():
            if isinstance(value, fx.Node) and self._is_state(value):
                return Call(node.target, self._module[node.target], keyword=keyword)
        return None


@dataclass
class _Back:
    nodes: set[fx.Node] = field(default_factory=set)
    states: list[fx.Node] = field(default_factory=list)
    included: set[fx.Node] = field(default_factory=set)


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDING
        and len(node.all_input_nodes) > 1
        and "alpha" not in node.kwargs
    )


def _has_matrix(module: nn.Module, recurse: bool = True) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse))


def _keeps(module: nn.Module) -> bool:
    """Whether a module hands on what it is given: an identity, or a dropout that drops nothing."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return False
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0.0
    )
