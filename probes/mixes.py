"""Find on a tape where the model mixes what it has made before: weights times sources, whatever made the weights.

No operation is known by name. An operand is followed when the result is linear in it and leaves its channels alone,
which is decided by trying with random values; what stands beside it are the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from probes.kernels import Law, law_of, solved
from probes.tape import Node, Tape
from probes.trials import Trials, axes_of, axis_of, tried

SHARE_OF_WIDTH = 4  # with more sources than this share of the channels, any weights explain a mix
_TOLERANCE = 2e-2  # operations that cast to bfloat16 are linear to 4e-3


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
    passed: set[Node] = field(default_factory=set)  # norms on the way, of many sources at once
    law: Law | None = None  # of a kernel

    @property
    def normalised(self) -> bool:
        """Whether what is summed are the normalised sources."""
        return bool(self.passed)

    @property
    def sources(self) -> list[Node]:
        return [edge.source for edge in self.edges]


class Mixes(Trials):
    """All mixes of a tape of a model of this `width`, in order; `plain` says of any stream tensor whether it is a sum.
    Whoever asks puts random numbers back: each trial begins them anew."""

    def __init__(self, tape: Tape, width: int):
        super().__init__(tape, width)
        self._size = tape.items * tape.tokens * width
        self._plain: dict[Node, bool] = {}
        self._whole: set[Node] = set()  # weighted sums that count as one: other mixes, experts of one layer
        self.found: dict[Node, Mix] = {}
        self.single: dict[
            Node, Mix
        ] = {}  # one source with a weight: a gate, or a first read without a softmax
        for node in tape.nodes:
            if self.is_stream(node) and node.func is not None:
                self._look_at(node)

    def _look_at(self, node: Node) -> None:
        if node.opaque and (mix := self._behind_kernel(node)) is not None:
            self.found[node] = mix
            self._whole.add(node)
            self._plain[node] = True
            return
        if self.linear(node, node.value.ndim - 1) is None or self.plain(node) or not self._ends(node):
            return
        mix = self._walked(node)
        if mix is not None and (_chained(self.tape, mix) or _trivial(mix)):
            self.found[node] = mix
        elif mix is not None and len(mix.edges) == 1 and self._learned(mix):
            self.single[node] = mix
        self._whole.add(node)
        self._plain[node] = True  # whatever sums it up has it as one source

    def _learned(self, mix: Mix) -> bool:
        """Whether parameters have a say in the weight, as they have none in 1/rms."""
        source = mix.edges[0].source
        return any(
            self._is_parameter(other) or self._has_parameter(other, source)
            for node, operands in mix.steps.items()
            for _, other in self._others(node, operands)
        )

    # What a node does

    def is_stream(self, node: Node) -> bool:
        x = node.tensor
        return x.is_floating_point() and x.ndim > 1 and x.shape[-1] == self.width and x.numel() == self._size

    def plain(self, node: Node) -> bool:
        """Whether a tensor is a sum of others, each as it is, or no sum at all."""
        if node not in self._plain:
            axis = axis_of(node, self.width)
            operands = None if node.func is None or axis is None else self.linear(node, axis)
            self._plain[node] = operands is None or (
                not self.weighted(node) and all(self.plain(node.slots[slot]) for slot, _ in operands)
            )
        return self._plain[node]

    def _ends(self, node: Node) -> bool:
        """Whether the sum is complete here: something else is done with it than adding to it."""
        if any(not spot.before for spot in self.tape.spots.get(node, ())):
            return True
        return not self.tape.users.get(node) or any(
            not self._hands_on(user, node) for user in self.tape.users[node]
        )

    def _hands_on(self, user: Node, node: Node) -> bool:
        for axis in axes_of(user, self.width):
            operands = self.linear(user, axis)
            if operands and any(user.slots[slot] is node for slot, _ in operands):
                return True
        return False

    # The sources of a mix

    def _behind_kernel(self, node: Node) -> Mix | None:
        """The mix that a kernel makes of the sources it is given, where its law is known or least squares can tell their
        weights."""
        mix = Mix(node, {}, [])
        for slot, each in enumerate(node.slots):
            if (
                not each.tensor.is_floating_point()
                or each.func is None
                or self.width not in each.tensor.shape
            ):
                continue
            source, axis = self.bare(each), axis_of(each, self.width)
            if self.is_stream(source):
                mix.edges.append(Edge(node, slot, axis, source))
            elif each.tensor.numel() > self._size and self.linear(each, axis) is not None:
                self._walk(mix, each, axis)
        if not _chained(self.tape, mix) and len(mix.edges) != 1:
            return None
        mix.law = law_of(node, mix.sources, self.width)
        if mix.law is not None:
            return mix
        if len(mix.edges) == 1:
            return mix if _trivial(mix) else None
        if len(mix.edges) * SHARE_OF_WIDTH > self.width:
            return None
        weights = solved(mix_values := [edge.source.value for edge in mix.edges], node.value)
        made = sum(weight.unsqueeze(-1) * value for weight, value in zip(weights, mix_values, strict=True))
        return mix if (made - node.value).norm() < _TOLERANCE * node.value.norm() else None

    def _walked(self, node: Node) -> Mix | None:
        mix = Mix(node, {}, [])
        try:
            self._walk(mix, node, node.value.ndim - 1)
        except _Lost:
            return None
        order = {id(edge): place for place, edge in enumerate(mix.edges)}
        mix.edges.sort(key=lambda edge: (edge.source.index, order[id(edge)]))
        return mix

    def _walk(self, mix: Mix, node: Node, axis: int) -> None:
        operands = self.linear(node, axis)
        passed = None
        if operands is None or self._normalises_by_itself(node, operands):
            passed = self._normalised(node, axis)
            if passed is None:
                raise _Lost
            mix.passed.add(node)
            operands = [passed]
        mix.steps[node] = operands
        for slot, at in operands:
            child = node.slots[slot]
            if child in mix.steps:
                continue
            source = self.bare(child)
            if not source.value.any() and self._adds_as_is(node, slot):
                continue  # zeros that a sum begins with
            if child.tensor.numel() <= self._size and self.plain(source):
                mix.edges.append(Edge(node, slot, at, source))
                continue
            if not self._is_blank(child):
                self._walk(mix, child, at)

    def _is_blank(self, node: Node) -> bool:
        """An empty store that sources are written to."""
        name = _name(node)
        return "empty" in name or "zeros" in name or not node.value.any()

    def bare(self, node: Node) -> Node:
        """What stands behind views and casts."""
        while node.func is not None and node not in self._whole:
            axis = axis_of(node, self.width)
            operands = self.linear(node, axis) if axis is not None else None
            if operands and len(operands) > 1:  # written over a store for one
                operands = [each for each in operands if "empty" not in _name(node.slots[each[0]])]
            if not operands or len(operands) > 1 or self.weighted(node):
                break
            inner = node.slots[operands[0][0]]
            if inner.tensor.numel() > node.tensor.numel():
                inner = self._chosen(node, inner)
            if inner is None or not _same_values(inner, node):
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
            axis = axis_of(each, self.width)
            operands = self.linear(each, axis) if each.func is not None and axis is not None else None
            if operands and not self.weighted(each):
                waiting += [each.slots[slot] for slot, _ in operands]
        return None

    def _normalises_by_itself(self, node: Node, operands: list[tuple[int, int]]) -> bool:
        """A product with something that its operand alone has made, as 1/rms, after which all have one size."""
        if len(operands) != 1 or node.tensor.numel() <= self._size:
            return False
        values = node.slots[operands[0][0]]
        others = [other for _, other in self._others(node, operands) if self.tape.made_from(other, values)]
        if not others or any(self._has_parameter(other, values) for other in others):
            return False
        sizes = node.value.double().square().mean(axis_of(node, self.width)).sqrt()
        sizes = sizes[sizes > 0]  # zeros have no size that could be made one
        return bool(len(sizes) > 1 and sizes.std() < 0.05 * sizes.mean())

    def _has_parameter(self, node: Node, beyond: Node) -> bool:
        """Whether a parameter has a say in `node` that does not go through `beyond`."""
        waiting, done = [node], {beyond}
        while waiting:
            each = waiting.pop()
            if each in done:
                continue
            done.add(each)
            if self._is_parameter(each):
                return True
            waiting += each.slots
        return False

    def _is_parameter(self, node: Node) -> bool:
        return bool(self._parameters >> node.index & 1)

    def _normalised(self, node: Node, axis: int) -> tuple[int, int] | None:
        """The operand that a norm of many sources at once normalises, or whose channels a gain scales."""
        if node.func is None or node.tensor.numel() <= self._size:
            return None
        for slot, each in enumerate(node.slots):
            if each.tensor.shape != node.tensor.shape:
                continue
            others = [other for place, other in enumerate(node.slots) if place != slot]
            if others and all(self._is_parameter(o) and o.tensor.numel() == self.width for o in others):
                return slot, axis
            values = each.value.cpu().double() * 100
            try:
                one, two = (tried(node, {slot: values * scale}) for scale in (1, 2))
            except Exception:  # what cannot be tried is followed no further, and its read not recorded
                continue
            if torch.allclose(one, two, rtol=1e-2, atol=1e-4) or self._normalises_by_itself(
                node, [(slot, axis)]
            ):
                return slot, axis
        return None

    def terms(self, node: Node, stop: Node | None = None) -> list[Node]:
        """What a plain sum adds up, taken apart down to what layers make; other mixes and `stop` stay whole."""
        node = self.bare(node)
        axis = axis_of(node, self.width)
        if node is stop or node in self._whole or node.func is None or axis is None:
            return [node]
        operands = self.linear(node, axis)
        if operands is None or self.weighted(node):
            return [node]
        if len(operands) == 1 and node.slots[operands[0][0]].tensor.numel() == node.tensor.numel():
            return [node]  # scaled or dropped out: what is added is this
        found = [term for slot, _ in operands for term in self.terms(node.slots[slot], stop)]
        return list(dict.fromkeys(found)) or [node]


class _Lost(Exception):
    """A mix that cannot be followed to its sources."""


def _chained(tape: Tape, mix: Mix) -> bool:
    """Whether the sources were made one from the other, as layers are; experts of one layer are not."""
    sources = [each for each in dict.fromkeys(mix.sources) if each.value.any()]
    if len(mix.edges) < 2 or not sources:
        return False
    first, *rest = sorted(sources, key=lambda each: each.index)
    if not all(tape.made_from(each, first) for each in rest):
        return False
    pairs = list(zip([first, *rest], rest, strict=False))
    return 2 * sum(tape.made_from(two, one) for one, two in pairs) >= len(pairs)


def _trivial(mix: Mix) -> bool:
    """A mix of one source, which has weight 1."""
    return len(mix.edges) == 1 and _same_values(mix.edges[0].source, mix.node)


def _same_values(one: Node, two: Node) -> bool:
    if one.tensor.numel() != two.tensor.numel():
        return False
    a, b = (node.value.double().flatten() for node in (one, two))
    if one.tensor.shape != two.tensor.shape:
        a, b = a.sort().values, b.sort().values
    return torch.allclose(a, b, rtol=1e-2, atol=1e-6 + 1e-2 * float(a.abs().max()))


def _name(node: Node) -> str:
    return getattr(node.func, "__name__", "")


def widths(tape: Tape) -> Iterator[int]:
    """How wide the stream may be: the last axis most often met where modules meet, the likeliest first."""
    tokens = tape.items * tape.tokens
    counts: dict[int, int] = {}
    for node, spots in tape.spots.items():
        x = node.tensor
        if x.is_floating_point() and x.ndim > 1 and x.numel() == tokens * x.shape[-1] and x.shape[-1] > 1:
            counts[x.shape[-1]] = counts.get(x.shape[-1], 0) + len(spots)
    return iter(sorted(counts, key=lambda each: -counts[each]))
