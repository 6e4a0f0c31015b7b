"""What each layer is given, on a tape of a model with depth reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from probes.mixes import Mixes
from probes.tape import Node, Tape


@dataclass(frozen=True)
class Given:
    """The states of layers. `mixed` are what reads make; `stops` all that is read, and what layers make: `embedding` and
    `outputs`."""

    tape: Tape
    mixes: Mixes
    embedding: Node
    outputs: Sequence[Node]
    mixed: Sequence[Node]
    stops: set[Node]

    def to(self, output: Node) -> Node | None:
        """What the layer that makes `output` is given: the newest mix, sum or embedding that it was made from. None where
        it is given more than that, and no plain sum of them."""
        mixed = {self.mixes.carried(each, output) for each in self.mixed if self.tape.made_from(output, each)}
        every = {*mixed, *self.mixed, *self.stops}
        before = (each for each in every if self.tape.made_from(output, each))
        newest = max(before, key=lambda each: each.index)
        if newest in self.outputs and self._goes_past(newest, output):
            return self._sum_with(newest, output)
        return self._received(newest, output)

    def _received(self, state: Node, output: Node) -> Node:
        """The same values as a layer alone has them, as behind an attention kernel that weighs one source: their gradient
        is the layer's own."""
        alike = [each for each in self.tape.ancestors(output) if self._is_copy(each, state)]
        return next((each for each in reversed(alike) if not self._goes_past(each, output)), state)

    def _is_copy(self, node: Node, state: Node) -> bool:
        made = self.tape.made_from(node, state) and self.mixes.is_stream(node)
        return made and self.mixes.bare(node) is self.mixes.bare(state)

    def _goes_past(self, state: Node, output: Node) -> bool:
        """Whether a layer is given another source beside `state`, which is then no more than a part of its state."""
        waiting, done = [output], {state}
        while waiting:
            each = waiting.pop()
            if each in done:
                continue
            if each in self.stops and each is not output:
                return True
            done.add(each)
            waiting += each.slots
        return False

    def _sum_with(self, newest: Node, output: Node) -> Node | None:
        """The plain sum of `newest` and older sources that a layer receives, where no read mixes them."""
        known = {self.embedding, *self.outputs, *self.mixed}
        made = [each for each in self.tape.ancestors(output) if self.tape.made_from(each, newest)]
        for each in sorted(made, key=lambda each: each.index):
            if each is newest or not self.mixes.is_stream(each):
                continue
            terms = set(self.mixes.terms(each, self.embedding))
            if newest in terms and len(terms) > 1 and terms <= known and not self._goes_past(each, output):
                return each
        return None
