"""All that a model mixes of what it has made before: weights times sources, whatever made the weights."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from probes.kernels import law_of, solved
from probes.tape import Node, Tape
from probes.transformed import before_this_read
from probes.walks import Edge, Lost, Mix, Walks, name_of, same_values
from probes.weighing import reads_in

SHARE_OF_WIDTH = 4  # with more sources than this share of the channels, any weights explain a mix
_TOLERANCE = 2e-2  # operations that cast to bfloat16 are linear to 4e-3


class Mixes(Walks):
    """All mixes of a tape of a model of this `width`, in order. Whoever asks puts random numbers back: each trial begins
    them anew."""

    def __init__(self, tape: Tape, width: int, heads: int = 1):
        super().__init__(tape, width, heads)
        self.found: dict[Node, Mix] = {}
        self.sums: dict[Node, Mix] = {}  # and those that are no reads
        # One source with a weight: a gate, or a first read without a softmax.
        self.single: dict[Node, Mix] = {}
        self.gated: set[Node] = set()  # sums of a read and something else, by weights of their own
        for node in tape.nodes:
            if self.is_stream(node) and node.func is not None:
                self._look_at(node)
        self._leave_streams()
        self._look_at_the_first()

    def _look_at(self, node: Node) -> None:
        if node.opaque and (mix := self._behind_kernel(node)) is not None:
            self.found[node] = mix
            self.is_whole(node)
            self.mixed.add(node)
            return
        if self.linear(node, node.value.ndim - 1) is None or self.plain(node) or not self.ends(node):
            return
        for mix in self._reads_in(node):
            self._take(mix)
        if not self.plain(node):
            if any(child in self.whole for child in self._summed(node)):
                self.gated.add(node)
                self.mixed.add(node)
            self.is_whole(node)  # whatever sums it up has it as one source

    def _reads_in(self, node: Node, norms: frozenset[str] = frozenset()) -> list[Mix]:
        try:
            mix = self.walked(node, norms)
        except Lost:
            return []
        return reads_in(self, mix)

    def _take(self, mix: Mix) -> None:
        before_this_read(self, mix)
        chained = _chained(self.tape, mix)
        alone = len(mix.edges) == 1 and not self._forgets_size(mix)
        if (chained and not self._of_sums(mix)) or (alone and _trivial(mix)):
            self.found[mix.node] = mix
        elif alone and self._learned(mix):
            self.single[mix.node] = mix
        if chained or (mix.node in self.found and self._by_token(mix)):
            self.sums[mix.node] = mix
        self.is_whole(mix.node)
        if mix.node in self.found or mix.node in self.single:
            self.mixed.add(mix.node)

    def _summed(self, node: Node) -> set[Node]:
        """What a weighted sum was last made of, through single products."""
        found, waiting = set(), [node]
        while waiting:
            each = waiting.pop()
            for slot, _ in self.linear(each, each.value.ndim - 1) or ():
                child = each.slots[slot]
                found |= {child, self.bare(child)}
                if child not in self.whole and not self.plain(child) and self.is_stream(child):
                    waiting.append(child)
        return found

    def _of_sums(self, mix: Mix) -> bool:
        """Whether half of what is mixed are mixes themselves, as the streams of hyper-connections are, or what a gate
        adds a read to."""
        sources = set(mix.sources)
        return 2 * len(sources & self.sums.keys()) >= len(sources)

    @property
    def reason(self) -> str | None:
        """Why these are no depth reads: few of them have several sources, or each carries on the one before together with
        as many others as it."""
        wide = [mix for mix in self.found.values() if len({s for s in mix.sources if s.value.any()}) > 1]
        carried = [mix for mix in wide if self._carries_on(mix)]
        grows = len({len(mix.edges) for mix in carried}) > 1
        if len(wide) > 1 and (grows or len(wide) - len(carried) > 1):
            return None
        if not self.sums:
            return "no state in it is a weighted sum of several sources"
        return "its streams are summed, scaled, gated or mixed on their way, which is no depth read"

    def _carries_on(self, mix: Mix) -> bool:
        """Whether all that is mixed, but the oldest, goes on with what was mixed before."""
        _, *rest = sorted(set(mix.sources), key=lambda each: each.index)
        return bool(rest) and all(self._all_terms(each) & self.sums.keys() for each in rest)

    def _leave_streams(self) -> None:
        """Sums by weights that no source has a say in are no reads where they are a source of others that are."""
        keyed = [mix for mix in self.found.values() if self._by_token(mix)]
        if not keyed:
            return
        used = {term for mix in keyed for source in mix.sources for term in self._all_terms(source)}
        for node, mix in list(self.found.items()):
            if node in used and not self._by_token(mix):
                del self.found[node]
                self.whole.discard(node)

    def _by_token(self, mix: Mix) -> bool:
        """Whether what the model was given has a say in the weights."""
        if mix.node.opaque:
            return True
        given = sum(1 << node.index for node in self.tape.given)
        return any(
            (self.tape.behind[other.index] | 1 << other.index) & given
            for node, operands in mix.steps.items()
            if node not in mix.passed
            for other in self.weighs(node, operands)
        )

    def _all_terms(self, node: Node) -> set[Node]:
        node = self.bare(node)
        return {node, *self.terms(node)}

    def _look_at_the_first(self) -> None:
        """Reads of one source that is worked on before it is weighed, as those of several are."""
        wide = [mix for mix in self.found.values() if len(mix.edges) > 1]
        norms = frozenset(name_of(node) for mix in wide for node in mix.passed)
        first = min((mix.node.index for mix in wide), default=0)
        for node in self.tape.nodes[:first] if norms else ():
            if node not in self.whole or len(self.found[node].edges if node in self.found else ()) > 1:
                continue
            self.whole.discard(node)
            for mix in self._reads_in(node, norms):
                if mix.node is node and len(mix.edges) == 1 and mix.passed and self._learned(mix):
                    self.found.pop(node, None)
                    self.single[node] = mix
            self.whole.add(node)
        known = {source for mix in wide for source in mix.sources}
        for mix in [*self.found.values(), *self.single.values()]:
            if len(mix.edges) == 1 and self._by_token(mix):
                self._begin_at_a_source(mix, known)

    def _begin_at_a_source(self, mix: Mix, known: set[Node]) -> None:
        """The one source of a mix is what others have as a source too, though it may have been scaled since."""
        edge = mix.edges[0]
        node = edge.source
        while node not in known:
            axis = self.axis_of(node)
            operands = self.linear(node, axis) if axis is not None and node.func is not None else None
            if operands is None or len(operands) != 1:
                return
            node = node.slots[operands[0][0]]
        mix.edges = [replace(edge, source=node)]
        if node is not edge.source:
            self.single.pop(edge.source, None)
            if not same_values(node, edge.source):
                mix.passed.add(edge.source)

    def _forgets_size(self, mix: Mix) -> bool:
        """Whether it comes out the same whatever the size of its one source: then it is a norm, and no weight."""
        source = mix.edges[0].source
        if mix.node.opaque or mix.passed or mix.node is source:
            return False
        values = torch.randn(source.tensor.shape, dtype=torch.float64)
        try:
            one, other = (self.remade(mix.node, source, values * size) for size in (1, 4))
        except Exception:  # what cannot be tried is taken for what it looks like
            return False
        return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * float(one.abs().max()))

    def _learned(self, mix: Mix) -> bool:
        """Whether parameters have a say in the weight, as they have none in 1/rms."""
        source = mix.edges[0].source
        return any(
            self.is_parameter(other) or self.has_parameter(other, source)
            for node, operands in mix.steps.items()
            if node not in mix.passed
            for _, other in self.others(node, operands)
        )

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
            source, axis = self.bare(each), self.axis_of(each)
            if self.is_stream(source):
                mix.edges.append(Edge(node, slot, axis, source))
            elif each.tensor.numel() > self.size and self.linear(each, axis) is not None:
                self.walk(mix, each, axis)
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

    def terms(self, node: Node, stop: Node | None = None) -> list[Node]:
        """What a plain sum adds up, taken apart down to what layers make; other mixes and `stop` stay whole."""
        node = self.bare(node)
        axis = self.axis_of(node)
        if node is stop or node in self.whole or node.func is None or axis is None:
            return [node]
        operands = self.linear(node, axis)
        if operands is None or self.weighted(node):
            return [node]
        if len(operands) == 1 and node.slots[operands[0][0]].tensor.numel() == node.tensor.numel():
            return [node]  # scaled or dropped out: what is added is this
        found = [term for slot, _ in operands for term in self.terms(node.slots[slot], stop)]
        if any(each.tensor.numel() > self.size for each in found):
            return [node]  # cut out of something longer, as padding is off a convolution
        some = [each for each in dict.fromkeys(found) if each.value.any()]
        made = [each for each in some if self.is_stream(each)]
        if len(some) > len(made) == 1 and stop is not None and self.tape.made_from(made[0], stop):
            return [node]  # with a bias: what is added is both
        return list(dict.fromkeys(found)) or [node]


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
    return len(mix.edges) == 1 and same_values(mix.edges[0].source, mix.node)


def widths(tape: Tape) -> Iterator[int]:
    """How wide the stream may be: the last axis most often met where modules meet, the likeliest first."""
    tokens = tape.items * tape.tokens
    counts: dict[int, int] = {}
    for node, spots in tape.spots.items():
        x = node.tensor
        if x.is_floating_point() and x.ndim > 1 and x.numel() == tokens * x.shape[-1] and x.shape[-1] > 1:
            counts[x.shape[-1]] = counts.get(x.shape[-1], 0) + len(spots)
    return iter(sorted(counts, key=lambda each: -counts[each]))


def head_counts(tape: Tape, width: int) -> list[int]:
    """Into how many heads channels are split somewhere."""
    counts = {
        size
        for node in tape.nodes
        for size, part in pairwise(node.tensor.shape)
        if size > 1 and part > 1 and size * part == width
    }
    return sorted(counts)
