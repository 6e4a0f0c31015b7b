"""The way from a weighted sum back to what it sums, operation by operation.

No operation is known by name. An operand is followed when the result is linear in it and leaves its channels alone,
which is decided by trying with random values; what stands beside it are the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from probes.kernels import Law
from probes.tape import Node, Tape
from probes.trials import Trials


@dataclass(frozen=True)
class Edge:
    """Where a source enters a mix: as operand `slot` of `user`, there with its channels along `axis`."""

    user: Node
    slot: int
    axis: int
    source: Node  # behind views and casts


@dataclass
class Mix:
    """One weighted sum: `steps` are the nodes on the way from the sources, with the operands that carry them (slot and
    channel axis); `edges` its sources, oldest first."""

    node: Node
    steps: dict[Node, list[tuple[int, int]]]
    edges: list[Edge]
    passed: set[Node] = field(
        default_factory=set
    )  # norms, projections and the like of the sources, on the way
    law: Law | None = None  # of a kernel
    heads: int = 1  # each weighs channels of its own

    @property
    def normalised(self) -> bool:
        """Whether what is summed is made of the sources: normalised, projected, scaled."""
        return bool(self.passed)

    @property
    def sources(self) -> list[Node]:
        return [edge.source for edge in self.edges]

    def in_order(self, constant: Callable[[Node], bool]) -> "Mix":
        """Oldest source first, before it those that are the same for every token."""
        order = {id(edge): place for place, edge in enumerate(self.edges)}
        self.edges.sort(key=lambda e: (not constant(e.source), e.source.index, order[id(e)]))
        return self


class Lost(Exception):
    """A mix that cannot be followed to its sources; the message says why, where that is worth saying."""


class Walks(Trials):
    """Ways back on a tape of a model of this `width`."""

    def __init__(self, tape: Tape, width: int, heads: int = 1):
        super().__init__(tape, width, heads)
        self.size = tape.items * tape.tokens * width
        self._plain: dict[Node, bool] = {}
        self.whole: set[Node] = set()  # weighted sums that count as one: other mixes, experts of one layer
        self.mixed: set[Node] = set()  # mixes, and sums that these are part of

    def is_stream(self, node: Node) -> bool:
        x = node.tensor
        return x.is_floating_point() and x.ndim > 1 and x.shape[-1] == self.width and x.numel() == self.size

    def is_constant(self, node: Node) -> bool:
        """Whether it is the same for every token, though it is not zero: a learned vector, say."""
        if not self.is_stream(node) or not node.value.any():
            return False
        values = node.value.reshape(-1, self.width)
        return bool((values == values[0]).all())

    def carried(self, node: Node, towards: Node) -> Node:
        """The state that `node` is handed on in on the way `towards` what was made of it: itself, or what it was added to,
        or gated with, before anything else was made of it. Copies beside that way, as a model returns them, are none."""
        while True:
            users = {
                user
                for user in self.tape.users.get(node, ())
                if (user is towards or self.tape.made_from(towards, user)) and self._only_adds(user, node)
            }
            if len(users) != 1:
                return node
            node = users.pop()

    def _only_adds(self, user: Node, node: Node) -> bool:
        operands = self.linear(user, user.value.ndim - 1) if self.is_stream(user) else None
        if not operands or not any(user.slots[slot] is node for slot, _ in operands):
            return False
        return all(other is node or not self.tape.made_from(other, node) for other in user.slots)

    def plain(self, node: Node) -> bool:
        """Whether a tensor is a sum of others, each as it is, or no sum at all."""
        if node not in self._plain:
            axis = self.axis_of(node)
            operands = None if node.func is None or axis is None else self.linear(node, axis)
            self._plain[node] = operands is None or (
                not self.weighted(node) and all(self.plain(node.slots[slot]) for slot, _ in operands)
            )
        return self._plain[node]

    def is_whole(self, node: Node) -> None:
        """From now on whatever sums `node` up has it as one source."""
        self.whole.add(node)
        self._plain = {node: True} | {each: flag for each, flag in self._plain.items() if flag}
        self._plain[node] = True

    def ends(self, node: Node) -> bool:
        """Whether the sum is complete here: something else is done with it than adding to it."""
        if any(not spot.before for spot in self.tape.spots.get(node, ())):
            return True
        return not self.tape.users.get(node) or any(
            not self._hands_on(user, node) for user in self.tape.users[node]
        )

    def _hands_on(self, user: Node, node: Node) -> bool:
        for axis in self.axes_of(user):
            operands = self.linear(user, axis)
            if operands and any(user.slots[slot] is node for slot, _ in operands):
                return True
        return False

    def walked(self, node: Node, norms: frozenset[str] = frozenset()) -> Mix:
        """The way from `node` back to its sources. A single source may be normalised by operations of the names in
        `norms`. Raises Lost."""
        mix = Mix(node, {}, [])
        self.walk(mix, node, node.value.ndim - 1, norms)
        axes = (
            step.slots[slot].tensor.shape[axis] for step, all_ in mix.steps.items() for slot, axis in all_
        )
        mix.heads = self.heads if any(size != self.width for size in axes) else 1
        return mix.in_order(self.is_constant)

    def walk(self, mix: Mix, node: Node, axis: int, norms: frozenset[str] = frozenset()) -> None:
        operands = self.linear(node, axis)
        if operands is None or self._normalises_by_itself(node, operands, norms):
            operands = [self._passed(node, axis, norms)]
            mix.passed.add(node)
        mix.steps[node] = operands
        for slot, at in operands:
            child = node.slots[slot]
            if child in mix.steps:
                continue
            source = self.bare(child)
            if self._is_blank(source) and self.adds_as_is(node, slot):
                continue  # zeros that a sum begins with
            deeper = source.func is not None and name_of(source) in norms
            if child.tensor.numel() <= self.size and self.plain(source) and not deeper:
                mix.edges.append(Edge(node, slot, at, source))
            elif not self._is_blank(child):
                self.walk(mix, child, at, norms)

    def _is_blank(self, node: Node) -> bool:
        """An empty store that sources are written to, or zeros that a sum begins with."""
        name = name_of(node)
        if "empty" in name or "zeros" in name:
            return True
        if node.func is None or node.value.any():
            return False
        axis = self.axis_of(node)
        return axis is None or self.linear(node, axis) is None

    def bare(self, node: Node) -> Node:
        """What stands behind views and casts."""
        while node.func is not None and node not in self.whole:
            axis = self.axis_of(node)
            operands = self.linear(node, axis) if axis is not None else None
            if operands and len(operands) > 1:  # written over a store for one
                operands = [each for each in operands if "empty" not in name_of(node.slots[each[0]])]
            if not operands or len(operands) > 1 or self.weighted(node):
                break
            inner = node.slots[operands[0][0]]
            if inner.tensor.numel() > node.tensor.numel():
                inner = self._chosen(node, inner)
            if inner is None or not same_values(inner, node):
                break
            node = inner
        return node

    def _chosen(self, node: Node, store: Node) -> Node | None:
        """What was put into a store of several sources and is now taken out of it."""
        waiting, done = [store], set()
        while waiting:
            each = waiting.pop(0)
            if each in done:
                continue
            done.add(each)
            if each.tensor.numel() == node.tensor.numel():
                if torch.equal(each.value.flatten(), node.value.flatten()):
                    return each
                continue
            axis = self.axis_of(each)
            operands = self.linear(each, axis) if each.func is not None and axis is not None else None
            if operands and not self.weighted(each):
                waiting += [each.slots[slot] for slot, _ in operands]
        return None

    # What is done to the sources before they are weighed

    def _normalises_by_itself(
        self, node: Node, operands: list[tuple[int, int]], norms: frozenset[str]
    ) -> bool:
        """A product with something that its operand alone has made, as 1/rms, after which all have one size."""
        if len(operands) != 1 or not self._may_pass(node, norms):
            return False
        values = node.slots[operands[0][0]]
        others = [other for _, other in self.others(node, operands) if self.tape.made_from(other, values)]
        if not others or any(self.has_parameter(other, values) for other in others):
            return False
        sizes = node.value.double().square().mean(self.axis_of(node)).sqrt()
        sizes = sizes[sizes > 0]  # zeros have no size that could be made one
        return bool(len(sizes) > 1 and sizes.std() < 0.05 * sizes.mean())

    def has_parameter(self, node: Node, beyond: Node) -> bool:
        """Whether a parameter has a say in `node` that does not go through `beyond`, or what is the same as it: a kernel
        of one source gives that back whatever its query."""
        end = self.bare(beyond)
        waiting, done = [node], {beyond}
        while waiting:
            each = waiting.pop()
            if each in done or (self.is_stream(each) and self.bare(each) is end):
                continue
            done.add(each)
            if self.is_parameter(each):
                return True
            waiting += each.slots
        return False

    def _may_pass(self, node: Node, norms: frozenset[str]) -> bool:
        """Whether many sources at once are worked on, or one where that is known to be done."""
        return node.tensor.numel() > self.size or name_of(node) in norms

    def _passed(self, node: Node, axis: int, norms: frozenset[str]) -> tuple[int, int]:
        """The operand that is worked on source by source."""
        if node.func is not None and self._may_pass(node, norms):
            for slot, each in enumerate(node.slots):
                if each.tensor.shape != node.tensor.shape:
                    continue
                if self.each_by_itself(node, slot):
                    return slot, axis
                operands = [(slot, axis)]
                if self._normalises_by_itself(node, operands, norms):
                    return slot, axis
        raise Lost


def same_values(one: Node, two: Node) -> bool:
    if one.tensor.numel() != two.tensor.numel():
        return False
    a, b = (node.value.double().flatten() for node in (one, two))
    if one.tensor.shape != two.tensor.shape:
        a, b = a.sort().values, b.sort().values
    return torch.allclose(a, b, rtol=1e-2, atol=1e-6 + 1e-2 * float(a.abs().max()))


def name_of(node: Node) -> str:
    return getattr(node.func, "__name__", "")
