"""Try what an operation does to its operands: no operation is known by name, each is called with random values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.symbols import reseed
from probes.tape import Node, Tape

_TOLERANCE = 2e-2  # operations that cast to bfloat16 are linear to 4e-3
_MIXING_CHANNELS = {
    "softmax",
    "layer_norm",
    "rms_norm",
    "embedding",
    "silu",
    "gelu",
    "relu",
}
_MIXING_AXIS = {
    "linear": -1,
    "conv1d": -2,
    "conv2d": -3,
    "conv3d": -4,
}  # these mix what stands along one axis


class Trials:
    """What the operations of a tape of a model of this `width` do, each found out once. With several `heads`, channels
    are those of one head: what treats the heads differently leaves them alone all the same."""

    def __init__(self, tape: Tape, width: int, heads: int = 1):
        self.tape, self.width, self.heads = tape, width, heads
        self.part = width // heads
        self._linear: dict[tuple[Node, int], list[tuple[int, int]] | None] = {}
        self._weighted: dict[Node, bool] = {}
        given = {id(each.tensor) for each in tape.given}
        leaves = [each for each in tape.nodes if each.func is None]
        self._parameters = sum(1 << each.index for each in leaves if each.parameter is not None)
        self._sources = self._parameters | sum(1 << n.index for n in leaves if id(n.tensor) in given)

    def axes_of(self, node: Node) -> list[int]:
        """Where its channels may be."""
        return [axis for axis, size in enumerate(node.tensor.shape) if size in (self.width, self.part)]

    def axis_of(self, node: Node) -> int | None:
        axes = self.axes_of(node)
        return axes[-1] if axes else None

    def linear(self, node: Node, axis: int) -> list[tuple[int, int]] | None:
        """The operands in which `node` is linear, leaving channels along `axis` alone: (slot, channel axis) of each."""
        key = node, axis
        if key not in self._linear:
            self._linear[key] = self._find_linear(node, axis)
        return self._linear[key]

    def _find_linear(self, node: Node, axis: int) -> list[tuple[int, int]] | None:
        name = getattr(node.func, "__name__", "")
        if node.func is None or name in _MIXING_CHANNELS or axis - node.value.ndim == _MIXING_AXIS.get(name):
            return None
        from_end = axis - node.value.ndim
        candidates = {
            slot: sorted(self.axes_of(each), key=lambda a, e=each: a - e.value.ndim != from_end)
            for slot, each in enumerate(node.slots)
            if each.tensor.is_floating_point() and self.axes_of(each)
        }
        if not candidates:
            return None
        several = [tuple(candidates)] if len(candidates) > 1 else []
        for slots in [*several, *((slot,) for slot in reversed(candidates))]:
            for place in range(max(len(candidates[slot]) for slot in slots)):
                operands = [(s, candidates[s][min(place, len(candidates[s]) - 1)]) for s in slots]
                if self._is_linear(node, axis, operands):
                    return [each for each in operands if len(operands) == 1 or self._has_part(node, each[0])]
        return None

    def _has_part(self, node: Node, slot: int) -> bool:
        """Whether the values of an operand matter, as those that only lend their shape do not."""
        values = torch.randn(node.slots[slot].tensor.shape, dtype=torch.float64)
        return not torch.equal(*(tried(node, {slot: each}) for each in (values, 1 - values)))

    def _is_linear(self, node: Node, axis: int, operands: list[tuple[int, int]]) -> bool:
        found = self._tried_linear(node, axis, operands, {})
        if found is None:  # nothing comes out, as with weights that happen to be zero
            carried = {slot for slot, _ in operands}
            beside = {
                slot: _drawn(each)
                for slot, each in enumerate(node.slots)
                if slot not in carried and each.tensor.is_floating_point()
            }
            found = bool(beside) and self._tried_linear(node, axis, operands, beside)
        if found and (gains := self._gains(node, operands)):
            found = self._tried_linear(node, axis, operands, gains)
        return bool(found)

    def _gains(self, node: Node, operands: list[tuple[int, int]]) -> dict[int, Tensor]:
        """Other values for parameters by channel that are the same in all of them, as gains before training are."""
        given = sum(1 << each.index for each in self.tape.given)
        found = {}
        for slot, each in self.others(node, operands):
            behind = self.tape.behind[each.index] | 1 << each.index
            if not each.tensor.is_floating_point() or not self.axes_of(each) or behind & given:
                continue
            leaves = [x for x in (each, *self.tape.ancestors(each)) if self.is_parameter(x)]
            last = each.value.movedim(self.axis_of(each), -1)
            if any(map(self.axes_of, leaves)) and bool((last == last[..., :1]).all()):
                found[slot] = _drawn(each)
        return found

    def _tried_linear(
        self, node: Node, axis: int, operands: list[tuple[int, int]], beside: dict[int, Tensor]
    ) -> bool | None:
        mixing = torch.randn(self.part, self.part, dtype=torch.float64) / self.part**0.5
        one, two, both = dict(beside), dict(beside), dict(beside)
        for slot, at in operands:
            x, y = (_drawn(node.slots[slot]) for _ in range(2))
            one[slot], two[slot], both[slot] = x, y, _mixed(x, mixing, at) + y
        try:
            f_one, f_two, f_both = (tried(node, each) for each in (one, two, both))
        except Exception:  # double precision does not suit every operation
            return False
        if f_one.shape != node.tensor.shape or axis not in self.axes_of(node):
            return False
        expected = _mixed(f_one.cpu().double(), mixing, axis) + f_two.cpu().double()
        size = expected.abs().max()
        if size == 0:
            return None
        return bool((f_both.cpu().double() - expected).abs().max() <= _TOLERANCE * size)

    def weighted(self, node: Node) -> bool:
        """Whether the values of its other operands matter, and are not constants."""
        if node not in self._weighted:
            axis = self.axis_of(node)
            operands = self.linear(node, axis) if axis is not None else None
            self._weighted[node] = bool(operands) and any(
                self.matters(node, slot, operands) for slot, _ in self.others(node, operands)
            )
        return self._weighted[node]

    def others(self, node: Node, operands: Sequence[tuple[int, int]]) -> list[tuple[int, Node]]:
        carrying = {slot for slot, _ in operands}
        return [(slot, each) for slot, each in enumerate(node.slots) if slot not in carrying]

    def matters(self, node: Node, slot: int, operands: Sequence[tuple[int, int]]) -> bool:
        """Whether another operand has a say in what the node makes of `operands`, whatever their values."""
        other = node.slots[slot]
        if not self._varies(other):
            return False
        if not other.tensor.is_floating_point():
            return True
        carried = {at for at, _ in operands}
        # Equal keys, say, leave a softmax as it is whatever the query: then all values are drawn.
        for some in (carried, set(range(len(node.slots)))):
            drawn = {at: _drawn(node.slots[at]) for at in some if node.slots[at].tensor.is_floating_point()}
            value = drawn.get(slot, other.value.cpu().double())
            try:
                before = tried(node, drawn)
                after = tried(node, drawn | {slot: value * 1.5 + 0.1})
            except Exception:  # any operation may refuse in a way of its own; what cannot be tried counts
                return True
            if not torch.allclose(before, after, rtol=1e-6, equal_nan=True):
                return True
        return False

    def weighs(self, node: Node, operands: Sequence[tuple[int, int]]) -> list[Node]:
        """What stands beside the `operands` of a node and matters to what it makes of them."""
        return [other for slot, other in self.others(node, operands) if self.matters(node, slot, operands)]

    def each_by_itself(self, node: Node, slot: int) -> bool:
        """Whether an operand of the same shape is worked on place by place, as by a norm, a projection or a gate: what
        stands at one place decides what comes out there, and nothing else."""
        like = node.slots[slot].value
        if like.shape != node.tensor.shape or like.shape[-1] != self.width or not like.is_floating_point():
            return False
        if any(other is node.slots[slot] for other in self._except(node, slot)):
            return False
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            values = torch.randn(like.shape, dtype=torch.float64, generator=generator)
            changed = values.clone()
            place = tuple(int(torch.randint(size, (1,), generator=generator)) for size in like.shape[:-1])
            changed[place] += torch.randn(self.width, dtype=torch.float64, generator=generator)
            try:
                apart = (tried(node, {slot: values}) - tried(node, {slot: changed})).abs().cpu()
            except Exception:  # what cannot be tried is followed no further
                return False
            if apart.shape != like.shape or not apart[place].any():
                return False
            apart[place] = 0
            if apart.any():
                return False
        return True

    def projects(self, node: Node, slot: int) -> bool:
        """Whether a node is a linear map of an operand, but for a shift, as a projection or a view is and a layer is not."""
        if not node.tensor.is_floating_point():
            return False
        one, two = (_drawn(node.slots[slot]) for _ in range(2))
        try:
            nothing, of_one, of_two, of_both = (
                tried(node, {slot: x}).cpu() for x in (torch.zeros_like(one), one, two, one + two)
            )
        except Exception:  # what cannot be tried counts as a layer
            return False
        apart = (of_both - of_one - of_two + nothing).abs().max()
        return bool(apart <= _TOLERANCE * (of_both - nothing).abs().max())

    @staticmethod
    def _except(node: Node, slot: int) -> list[Node]:
        return [each for place, each in enumerate(node.slots) if place != slot]

    def is_parameter(self, node: Node) -> bool:
        return bool(self._parameters >> node.index & 1)

    def _varies(self, node: Node) -> bool:
        """Whether it was made from parameters or from what the model was given."""
        return bool((self.tape.behind[node.index] | 1 << node.index) & self._sources)

    def remade(self, node: Node, source: Node, values: Tensor) -> Tensor:
        """What a node would be, were the values of one that it is made from others."""
        made = {source: values}
        for each in self.tape.nodes[source.index + 1 : node.index + 1]:
            if self.tape.made_from(each, source) and (each is node or self.tape.made_from(node, each)):
                made[each] = tried(each, {s: made[x] for s, x in enumerate(each.slots) if x in made})
        return made[node]

    def adds_as_is(self, node: Node, slot: int) -> bool:
        """Whether an operand is added to the rest without a weight."""
        if node.slots[slot].tensor.shape != node.tensor.shape:
            return False
        values = torch.randn(node.tensor.shape, dtype=torch.float64)
        with_it, without = (tried(node, {slot: each}) for each in (values, torch.zeros_like(values)))
        return torch.allclose((with_it - without).cpu().double(), values, atol=1e-6)


def _drawn(like: Node) -> Tensor:
    return torch.randn(like.tensor.shape, dtype=torch.float64)


def _mixed(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    channels = x.movedim(axis, -1)
    parts = channels.unflatten(-1, (-1, len(matrix)))
    return (parts @ matrix).flatten(-2).movedim(-1, axis)


def tried(node: Node, instead: dict[int, Tensor]) -> Tensor:
    """The node's operation in double precision, with other values in some slots. Dropout drops the same each time."""
    values = []
    for slot, each in enumerate(node.slots):
        value = instead.get(slot, each.value)
        values.append(value.to(each.tensor.device, torch.float64) if value.is_floating_point() else value)
    reseed(node.tensor.device)
    return node.call(values)
