"""Where hooks meet the tensors of a tape."""

from collections.abc import Iterator

import torch

from probes.found import Spot
from probes.mixes import Mixes
from probes.sites import Place, place_of
from probes.tape import Node, Tape


class Seen:
    """Of a tape whose layers make tensors with `tokens_first` or items first."""

    def __init__(self, tape: Tape, mixes: Mixes, tokens_first: bool):
        self._tape, self._mixes, self.tokens_first = tape, mixes, tokens_first
        self._runs = {moment.module: moment.turn + 1 for moment in tape.moments}

    def at(self, node: Node, before: bool | None = None) -> Spot | None:
        """Where hooks meet a tensor, or the same behind a view or cast; best with items and tokens in the order of
        what layers make, and where its module runs once."""
        spots = [
            (self.is_turned(each), self._runs[spot.module], spot.moment, spot)
            for each in (node, *self.same(node))
            for spot in self._tape.spots.get(each, ())
            if spot.name and before in (None, spot.before)
        ]
        return min(spots, key=lambda each: each[:3], default=(None,))[-1]

    def received(self, node: Node) -> Spot | None:
        """The same, best where a module is given it."""
        return self.at(node, before=True) or self.at(node)

    def at_parts(self, node: Node) -> tuple[Spot, ...]:
        """Where a tensor is seen; where nowhere, the parts that it sums, in order."""
        spot = self.at(node)
        if spot is not None:
            return (spot,)
        parts = [node.slots[slot] for slot, _ in self._mixes.linear(node, node.value.ndim - 1) or ()]
        spots = [self.at(part) for part in parts]
        if (
            len(parts) < 2
            or None in spots
            or not torch.allclose(sum(p.value for p in parts), node.value, rtol=1e-2)
        ):
            return ()
        if not any(
            p.tensor.shape == node.tensor.shape and len(self._tape.users.get(p, ())) == 1 for p in parts
        ):
            return ()
        return tuple(sorted(spots, key=lambda spot: spot.moment))

    def same(self, node: Node, bare: Node | None = None) -> Iterator[Node]:
        """Views and casts of a tensor."""
        for user in self._tape.users.get(node, ()):
            alike = user.tensor.numel() == node.tensor.numel() and user.tensor.is_floating_point()
            if alike and self._mixes.bare(user) is (bare or node):
                if self._mixes.is_stream(user):
                    yield user
                yield from self.same(user, bare or node)

    def is_turned(self, node: Node) -> bool:
        """Whether it has items first where what layers make has tokens first."""
        return self.tokens_first and node.tensor.shape[:2] == (self._tape.items, self._tape.tokens)

    def place(self, spot: Spot | None) -> Place | None:
        return None if spot is None else place_of(spot, self._runs[spot.module])
