"""The final state of a model with depth reads, on its tape: what is handed to the final norm, or to the head."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from probes.mixes import Mixes
from probes.naming import is_matrix, stem
from probes.stacks import is_norm
from probes.tape import Node, Tape
from probes.walks import Mix


@dataclass(frozen=True)
class Ending:
    """What comes after the layers. `reads` are in order."""

    tape: Tape
    mixes: Mixes
    embedding: Node
    reads: Sequence[Mix]

    def state(self) -> Node | None:
        """The last state that a norm receives, or the last sum of what is known."""
        last = max(mix.node.index for mix in self.reads)
        received = [
            (spot.moment, node)
            for node, spots in self.tape.spots.items()
            for spot in spots
            if spot.before and is_norm(spot.module) and self.mixes.is_stream(node)
        ]
        if received:
            node = self.mixes.bare(max(received, key=lambda each: each[0])[1])
            if node.index >= last:
                return self._behind_layer(node) if node in self.mixes.found else self._before_head(node)
        known = {source for mix in self.reads for source in mix.sources}
        for node in reversed(self.tape.nodes):
            if self.mixes.is_stream(node) and self.mixes.plain(node):
                bare = self.mixes.bare(node)
                terms = self.mixes.terms(bare, self.embedding)
                if bare in self.mixes.found:
                    return self._behind_layer(bare)
                if len(terms) > 1 and known & {bare, *terms}:
                    return bare
        return None

    def _behind_layer(self, node: Node) -> Node:
        """What a last layer that no read follows makes of the newest mix, handed to a head without a norm; else the mix."""
        made = [each for each in self.tape.users if self.tape.made_from(each, node)]
        streams = [each for each in made if self.mixes.is_stream(each)]
        newest = max(streams, key=lambda each: each.index, default=node)
        return self._before_head(self.mixes.bare(newest))

    def _before_head(self, node: Node) -> Node:
        """The state of which the head alone has made `node`: the newest mix, where no layer lies between."""
        reads = {mix.node for mix in self.reads}
        sources = {source for mix in self.reads for source in mix.sources}
        terms = self.mixes.terms(node, self.embedding)
        if node in reads or (len(terms) > 1 and {*terms} & {*reads, *sources}):
            return node
        before = [each for each in reads if self.tape.made_from(node, each)]
        newest = max(before, key=lambda each: each.index, default=None)
        if newest is None:
            return node
        lists = {stem(name) for source in sources for name in parameters_between(self.tape, source, reads)}
        matrices = {
            name for name, p in parameters_between(self.tape, node, reads, newest).items() if is_matrix(p)
        }
        if not lists & set(map(stem, matrices)) or self._is_projected(node, reads):
            return self.mixes.carried(newest, node)
        behind = [each for each in self.tape.ancestors(node) if self.tape.made_from(each, newest)]
        for each in filter(self.mixes.is_stream, behind):
            if not lists & set(map(stem, parameters_between(self.tape, node, {each, *reads}, newest))):
                return self.mixes.bare(each)
        return node

    def _is_projected(self, node: Node, reads: set[Node]) -> bool:
        """Whether a projection alone has made it of a mix."""
        while (node := self.mixes.bare(node)) not in reads:
            slots = [slot for slot, s in enumerate(node.slots) if self.tape.made_from(s, self.embedding)]
            if len(slots) != 1 or not self.mixes.projects(node, slots[0]):
                return False
            node = node.slots[slots[0]]
        return True


def parameters_between(
    tape: Tape, node: Node, stops: set[Node], beyond: Node | None = None
) -> dict[str, nn.Parameter]:
    """The parameters between `stops` and a node, by name; without those that work on something else than what is made of
    `beyond`, as on the time of a diffusion."""
    leaves, waiting, done = set(), [node], set()
    beside = sum(1 << each.index for each in tape.given) if beyond is not None else 0
    while waiting:
        each = waiting.pop()
        if each in done or (each in stops and each is not node):
            continue
        if tape.behind[each.index] & beside and not tape.made_from(each, beyond):
            continue
        done.add(each)
        if each.func is None:
            leaves.add(id(each.parameter))
        waiting += each.slots
    return {name: p for name, p in tape.root.named_parameters() if id(p) in leaves}
