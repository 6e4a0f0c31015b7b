"""Follow the stream through a forward without running it.

The forward is executed once on symbols, its children left closed, so that what it adds to the state it was given, and
what each child receives, can be read off the record. Nothing is computed, nothing is left behind, and no name of a
class or package matters.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from torch import fx, nn

from probes.flow import Call, Flow, Term
from probes.nodes import ancestors, has_matrix, is_sum, keeps, normalises, scales
from probes.recipes import Recipes
from probes.symbols import OTHER_TOKENS, Recording, Untraceable

_OPENED = 16  # children opened at most where the forward hands them the stream to add to


def follow_within(module: nn.Module, tokens: bool = False) -> Flow:
    """The longest stream within `module.forward`, wherever it begins and ends: from the embedding, say, to what the
    final norm (`norm`) receives. With `tokens`, it is more likely given these than states. Untraceable where there is
    none."""
    try:
        return _followed(module, optional=False, within=True, tokens=tokens)
    except Untraceable as error:
        with suppress(Untraceable):
            return _followed(module, optional=False, within=True, tokens=not tokens)
        raise error from None


def follow(module: nn.Module) -> Flow:
    """The stream through `module.forward`, which is its first argument. Untraceable where it cannot be followed."""
    try:
        flow = _followed(module, optional=False)
    except Untraceable as error:
        if "NoneType" not in str(error):
            raise
        try:  # what it needs has a default, as an embedding that is added at every block
            return _followed(module, optional=True)
        except Untraceable:
            raise error from None
    called = {child for term in flow.terms for call in term.calls for child in call.module.modules()}
    if any(child not in called and has_matrix(child, recurse=False) for child in module.modules()):
        # Cross-attention, say, runs only where the optional argument that it attends to is given.
        with suppress(Untraceable):
            other = _followed(module, optional=True)
            return max(flow, other, key=lambda each: len(each.terms))
    return flow


def _followed(module: nn.Module, optional: bool, within: bool = False, tokens: bool = False) -> Flow:
    opened = {module}
    while True:
        recording = Recording(module, opened, optional, tokens=tokens)
        twin = partial(Recording, module, opened, optional, OTHER_TOKENS, tokens)
        try:
            reading = _Reading(recording, Recipes(recording, twin))
            if within and (adding := reading.may_add() - opened):
                opened |= adding
                continue
            return reading.flow_within() if within else reading.flow()
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

    def __init__(self, recording: Recording, recipes: Recipes):
        self._recording, self._recipes = recording, recipes
        self._module = {name: module for module, name in recording.names.items()}
        self._paths: dict[fx.Node, _Path | None] = {}
        self._called = [node.target for node in recording.graph.nodes if node.op == "call_module"]
        self._within = False

    def flow(self) -> Flow:
        """From the first argument to the result that is made by adding to it."""
        results = self._recording.results
        place = next((place for place, node in results.items() if self._attempted(node) is not None), None)
        if place is None:
            for node in results.values():
                self._path(node)  # a closed child that hides the way says so
            raise Untraceable("what it returns is not its input with something added")
        path = self._path(results[place])
        terms = self._terms(path)
        changes = path.changes if path.norm is None else path.changes[:-1]
        change = "; ".join(dict.fromkeys(changes))
        norm = path.norm and self._received(path.norm)
        added = self._sum.get(path.terms[-1])
        ends = added is None or self._path(added).changes == path.changes
        return Flow(self._recording.argument, tuple(terms), change, norm, place, ends=ends)

    def flow_within(self) -> Flow:
        """From wherever a chain of sums begins to its end."""
        sums = [node for node in self._recording.graph.nodes if is_sum(node)]
        chains = [(self._chain(node), node) for node in sums]
        chain, last = max(chains, key=lambda each: len(each[0]), default=([], None))
        if not chain:
            raise Untraceable("nothing in it adds to what it was made from")
        self._recording.stream, self._within = chain[-1], True
        path = self._path(last)
        terms = self._terms(path)
        receiver = self._receiver(last)
        norm = receiver if receiver is not None and not has_matrix(receiver.module) else None
        change = "; ".join(dict.fromkeys(path.changes))
        start = self._tail(chain[-1])
        return Flow(self._recording.argument, tuple(terms), change, norm, start=start, end=receiver)

    def may_add(self) -> set[nn.Module]:
        """Modules without parameters that are given several things: what adds to the stream may be hidden in them."""
        calls = [node for node in self._recording.graph.nodes if node.op == "call_module"]
        modules = [self._module[node.target] for node in calls if len(node.all_input_nodes) > 1]
        return {module for module in modules if next(module.parameters(), None) is None}

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """From a sum backwards, always to the addend that another addend was made from."""
        chain: list[fx.Node] = []
        while is_sum(node):
            addends = [self._stripped(addend) for addend in self._addends(node)]
            made_from = set().union(*map(ancestors, addends))
            node = next((addend for addend in addends if addend in made_from), None)
            if node is None:
                break
            chain.append(node)
        return chain

    def _terms(self, path: _Path) -> list[Term]:
        self._trunk = set(path.trunk)
        self._after: dict[fx.Node, Call | None] = {}
        self._sum: dict[fx.Node, fx.Node] = {}  # where each term is added
        before: set[fx.Node] = set()
        for node in path.trunk:
            new = set(self._path(node).terms) - before
            if len(new) == 1:
                (term,) = new
                self._after[term], self._sum[term] = self._receiver(node), node
            before = set(self._path(node).terms)
        terms = self._ordered(path.terms)
        if not terms:
            raise Untraceable("it adds nothing to its input")
        return terms

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
        if is_sum(node):
            return self._sum_path(node)
        if normalises(node):
            return self._changed(node, node.args[0], "normalised", None)
        if scales(node):
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
            used_once = len(inner.users) == len(each.users) == 1
            found += self._addends(inner) if is_sum(inner) and used_once else [each]
        return found

    def _call_path(self, node: fx.Node) -> _Path | None:
        module = self._module[node.target]
        inputs = [n for n in node.all_input_nodes if self._attempted(n) is not None]
        if not inputs:
            # A closed child may hide the way: it says so itself.
            for each in node.all_input_nodes:
                self._path(each)
            return None
        if not has_matrix(module):
            if len(node.all_input_nodes) > 1 and module not in self._recording.opened:
                raise _Closed(Call(node.target, module))  # it may be what adds
            norm = node if next(module.parameters(), None) is not None else None
            return self._changed(node, inputs[0], f"changed by {node.target}", norm)
        raise _Closed(Call(node.target, module))

    def _changed(self, node: fx.Node, before: fx.Node, what: str, norm: fx.Node | None) -> _Path | None:
        path = self._path(before)
        return path and _Path([*path.trunk, node], path.terms, [*path.changes, what], norm)

    def _stripped(self, node: fx.Node) -> fx.Node:
        """The node behind operations that leave the values as they are."""
        while node.all_input_nodes and keeps(node, self._module):
            node = node.all_input_nodes[0]
        return node

    # The terms

    def _ordered(self, nodes: list[fx.Node]) -> list[Term]:
        """The terms, each after those that its state sums."""
        position = {node: index for index, node in enumerate(self._recording.graph.nodes)}
        made = [(node, self._made_from(node)) for node in nodes]
        made = [(node, back) for node, back in made if back is not None]
        made.sort(key=lambda each: (len(each[1].included), position[each[0]]))
        terms = {node for node, _ in made}  # others are added that no layer makes
        before = [None, *made]
        return [self._term(node, back, terms, before[i]) for i, (node, back) in enumerate(made)]

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
        if node in self._trunk or not is_sum(node):
            return node in self._trunk
        # The same sum may be written twice; what only looks like one, as a shift after a norm, has left the stream.
        path = self._attempted(node)
        return path is not None and all(each in self._trunk or is_sum(each) for each in path.trunk)

    def _term(
        self,
        node: fx.Node,
        back: "_Back",
        terms: set[fx.Node],
        before: "tuple[fx.Node, _Back] | None",
    ) -> Term:
        inside = [n for n in self._recording.graph.nodes if n in back.nodes]
        calls = tuple(Call(n.target, self._module[n.target]) for n in inside if n.op == "call_module")
        root = self._recording.root
        names = [n.target for n in inside if n.op == "get_attr"]
        parameters = tuple(root.get_parameter(n) for n in names if n in dict(root.named_parameters()))
        states = self._newest(back)
        receivers = [n for n in inside if n.op == "call_module" and set(states) & set(n.all_input_nodes)]
        received = next(filter(None, map(self._received, receivers)), None)
        tail = self._tail(node)
        begins = any(self._stripped(state) is self._recording.stream for state in states)
        return Term(
            calls,
            parameters,
            received,
            len(back.included & terms),
            tail,
            self._after.get(node),
            begins,
            bool(states and self._path(states[0]).changes),
            before is not None and self._adds_up(states, back, before),
            self._recipes.of(states[0])
            if received is None and states and (self._within or not begins)
            else None,
            self._recipes.of(node) if tail is None else None,
            self._scaled(node, states),
        )

    def _scaled(self, term: fx.Node, states: list[fx.Node]) -> bool:
        """Whether the stream is not what the term was made from when that is added to it, as behind a highway's gate."""
        added = self._sum.get(term)
        return bool(added and states) and self._path(added).changes != self._path(states[0]).changes

    def _newest(self, back: "_Back") -> list[fx.Node]:
        """The states that hold all that a term was made from."""
        return [s for s in dict.fromkeys(back.states) if set(self._path(s).terms) == back.included]

    def _adds_up(self, states: list[fx.Node], back: "_Back", before: "tuple[fx.Node, _Back]") -> bool:
        """Whether a state is the one before plus the term before, and nothing else."""
        term, other = before
        if not states or back.included != other.included | {term}:
            return False
        return any(
            self._path(state).changes == self._path(old).changes
            for state in states
            for old in self._newest(other)
        )

    def _tail(self, node: fx.Node) -> Call | None:
        node, key = self._stripped(node), 0
        if node.op == "call_function" and node.target is operator.getitem:
            node, key = node.args
            if not isinstance(key, int):
                return None  # a slice of a tensor, as of a joint attention's, is not what the call returns
            node = self._stripped(node) if isinstance(node, fx.Node) else node
        if not isinstance(node, fx.Node) or node.op != "call_module" or self._called.count(node.target) > 1:
            return None
        return Call(node.target, self._module[node.target], key)

    def _receiver(self, state: fx.Node) -> Call | None:
        """A call that receives just this state."""
        calls = [node for node in self._recording.graph.nodes if node.op == "call_module"]
        received = (self._received(node, lambda value: self._stripped(value) is state) for node in calls)
        return next(filter(None, received), None)

    def _received(self, node: fx.Node, is_it: Callable[[fx.Node], bool] | None = None) -> Call | None:
        """The call and the argument by which it receives the stream; None where it is called more than once."""
        is_it = is_it or self._is_state
        if self._called.count(node.target) > 1:
            return None
        for key, value in enumerate(node.args):
            if isinstance(value, fx.Node) and is_it(value):
                return Call(node.target, self._module[node.target], key)
        for keyword, value in node.kwargs.items():
            if isinstance(value, fx.Node) and is_it(value):
                return Call(node.target, self._module[node.target], keyword=keyword)
        return None


@dataclass
class _Back:
    nodes: set[fx.Node] = field(default_factory=set)
    states: list[fx.Node] = field(default_factory=list)
    included: set[fx.Node] = field(default_factory=set)
