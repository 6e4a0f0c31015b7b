"""What a mix weighs its sources with, computed again from what hooks have seen: a small program cut from the tape.

The operations from the sources to the mix are linear in the sources, so that with one-hot vectors in their place, and
everything else as it was, they return the weights: channel s of the result is the weight of source s.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from probes.found import Moment, Replay, Spot
from probes.kernels import by_definition, certain
from probes.tape import Node, Tape
from probes.walks import Edge, Mix, name_of

_METHODS = {
    method: name
    for name, method in ((name, getattr(torch.Tensor, name)) for name in dir(torch.Tensor))
    if callable(method) and name not in ("__class__", "__new__", "__init__", "__init_subclass__")
}
_BETWEEN = 12  # operations, of a norm written out and of casts around it
_MOST = 2000  # operations, beyond which something else than a read was followed


class Unreplayable(Exception):
    """The weights cannot be computed from what hooks see; the message says why."""


class DrawsNumbers(Unreplayable):
    """The weights are made of random numbers, which nobody can draw again."""


def replay_of(
    tape: Tape, twin: Tape, mix: Mix, until: int, witness: Node | None = None, head: int = 0
) -> Replay:
    """The program of one mix (of one `head` of it), and of a `witness` that is made of it, from what hooks see up to moment `until`. `twin` is
    a tape of the same model with another number of tokens: what differs depends on that."""
    return _Cutting(tape, twin, mix, until, witness or mix.node).replay(head)


def witness_of(tape: Tape, node: Node) -> tuple[Node, Spot] | None:
    """What hooks see first of that which is made of `node`, if only few operations lie between, as a norm that is no
    module, and none draws random numbers."""
    made = [
        (spot.moment, each, spot)
        for each, spots in tape.spots.items()
        if tape.made_from(each, node)
        and each.tensor.numel() == node.tensor.numel()
        and each.tensor.shape[-1] == node.tensor.shape[-1]
        for spot in spots
    ]
    if not made:
        return None
    _, witness, spot = min(made, key=lambda each: each[0])
    between = [witness, *(each for each in tape.ancestors(witness) if tape.made_from(each, node))]
    if any(each.opaque or each.draws for each in between):
        return None
    if len(between) > _BETWEEN:
        return None
    return witness, spot


class _Cutting:
    def __init__(self, tape: Tape, twin: Tape, mix: Mix, until: int, witness: Node):
        if len(tape.nodes) != len(twin.nodes):
            raise Unreplayable("what the forward does depends on its input")
        self._tape, self._twin, self._mix, self._until, self._witness = tape, twin, mix, until, witness
        self._graph = fx.Graph()
        self._stream = tape.items * tape.tokens * mix.node.tensor.shape[-1]
        self._real: dict[Node, fx.Node] = {}
        self._inputs: dict[Node, None] = {}
        self._collect()

    def replay(self, head: int) -> Replay:
        width = self._mix.node.tensor.shape[-1]
        for node in self._inputs:
            self._real[node] = self._graph.placeholder(f"x{node.index}")
        spots = tuple(self._spot(node) for node in self._inputs if self._spot(node) is not None)
        held = tuple(self._holder(node) for node in self._inputs if self._spot(node) is None)
        sources = [self._emit(self._alike(edge)) for edge in self._mix.edges]
        law = self._mix.law
        if law is not None:
            vectors = [self._emit(self._mix.node.slots[slot]) for slot in law.slots]
            both = self._graph.call_function(by_definition, (law, sources, vectors))
            weights, mix = (self._graph.call_function(_item, (both, place)) for place in (0, 1))
        elif self._mix.node.opaque:
            mix = self._emit(self._mix.node)
            weights = self._graph.call_function(certain, (sources, mix))
        else:
            weights, mix = self._weights(), self._emit(self._mix.node)
        several, call = self._mix.heads, self._graph.call_function
        if several > 1:
            if (
                not self._mix.passed
            ):  # of other channels than this head's, too, so that the state can be checked
                mix = call(_of_heads, (weights, sources))
            weights = call(_of_head, (weights, head, 1))
            sources = [call(_of_head, (each, head, width // several)) for each in sources]
        sources = [self._in_order(edge, x) for edge, x in zip(self._mix.edges, sources, strict=True)]
        self._real[self._mix.node] = mix
        made = self._emit(self._witness)
        self._graph.output((weights, sources, mix, made))
        module = fx.GraphModule(nn.Module(), self._graph)
        by_mix = self._mix.normalised or several > 1 or (law is not None and law.gain is not None)
        return Replay(module.forward, spots, held, by_mix)

    def _alike(self, edge: Edge) -> Node:
        """A source as it enters the mix, where it has the mix's shape there and not before, as with tokens first."""
        shape, node = self._mix.node.tensor.shape, edge.user.slots[edge.slot]
        if edge.source.tensor.shape == shape:
            return edge.source
        while node is not edge.source and node.tensor.shape != shape:  # a stack of one, say
            behind = (
                each for each in node.slots if each is edge.source or self._tape.made_from(each, edge.source)
            )
            node = next(behind, edge.source)
        return node

    def _in_order(self, edge: Edge, source: fx.Node) -> fx.Node:
        """A source with its tokens in the order of the mix."""
        items, tokens = self._tape.items, self._tape.tokens
        first = self._mix.node.tensor.shape[:2] == (tokens, items)
        turned = first and self._alike(edge).tensor.shape[:2] == (items, tokens)
        return self._graph.call_method("transpose", (source, 0, 1)) if turned else source

    def _collect(self) -> None:
        """What the program starts from: tensors that hooks see first, then those that are held."""
        node, law = self._mix.node, self._mix.law
        found, done = [], set() if law is None else {node}
        waiting = [edge.source for edge in self._mix.edges]
        waiting += [node] if law is None else [node.slots[slot] for slot in law.slots]
        waiting += [self._witness] if self._witness is not node else []
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            if len(done) > _MOST:
                raise Unreplayable("too much lies between what hooks see and the weights")
            own = node is self._mix.node and not node.opaque
            computed = own or self._tape.made_from(node, self._mix.node)
            if not computed and (self._spot(node) is not None or node.func is None):
                found.append(node)
                continue
            _refuse_drawing(node)
            waiting += node.slots
        found.sort(key=lambda node: (self._spot(node) is None, node.index))
        self._inputs = dict.fromkeys(found)

    def _spot(self, node: Node) -> Spot | None:
        if node.tensor.numel() > self._stream and node.func is not None:
            return None  # rather stacked again than kept
        spots = self._tape.spots.get(node, ())
        return next((spot for spot in spots if spot.moment <= self._until), None)

    def _holder(self, node: Node) -> tuple[nn.Module, str] | Tensor:
        if node.held is not None:
            return node.held
        if node.tensor.shape != self._twin.nodes[node.index].tensor.shape:
            raise Unreplayable("it needs a tensor that comes from nowhere")
        return node.tensor.detach()

    # Emitting

    def _emit(self, node: Node) -> fx.Node:
        """The node as it was computed."""
        if node not in self._real:
            self._real[node] = self._called(node, [self._emit(each) for each in node.slots])
        return self._real[node]

    def _called(self, node: Node, slots: list[fx.Node], func: Callable | None = None) -> fx.Node:
        if _drops(node):
            return slots[0]  # the weights before it; no random number may be drawn here
        _refuse_drawing(node)
        other = self._twin.nodes[node.index]
        if getattr(other.func, "__name__", None) != getattr(node.func, "__name__", None):
            raise Unreplayable("what the forward does depends on its input")
        given = iter(slots)
        args, kwargs = self._with_sizes((node.args, node.kwargs), (other.args, other.kwargs), given)
        graph, name = self._graph, _METHODS.get(node.func)
        if node.writes:
            if name == "__setitem__":
                return graph.call_function(_with_item, args, kwargs)
            copy = graph.call_method("clone", args[:1])
            graph.call_method(name or node.func.__name__, (copy, *args[1:]), kwargs)
            return copy
        func = func or node.func
        if node.cast is not None:
            made = graph.call_function(_within(node.cast, func), args, kwargs)
        elif name is not None:
            # What is put in the place of a source may lie in memory in another order.
            shaped = name == "view" and "dtype" not in kwargs and not isinstance(node.args[1], torch.dtype)
            made = graph.call_method("reshape" if shaped else name, args, {} if shaped else kwargs)
        else:
            made = graph.call_function(func, args, kwargs)
        return made if node.pick is None else graph.call_function(_item, (made, node.pick))

    def _with_sizes(self, tree: object, other: object, given):
        """Arguments with the sizes that depend on the input replaced."""
        if isinstance(tree, Node):
            return next(given)
        if isinstance(tree, tuple | list):
            if len(tree) != len(other):
                raise Unreplayable("what the forward does depends on its input")
            kind = list if isinstance(tree, list) else tuple
            return kind(self._with_sizes(a, b, given) for a, b in zip(tree, other, strict=True))
        if isinstance(tree, dict):
            return {key: self._with_sizes(each, other[key], given) for key, each in tree.items()}
        if isinstance(tree, slice):
            parts = ((getattr(tree, key), getattr(other, key)) for key in ("start", "stop", "step"))
            return slice(*(self._with_sizes(a, b, given) for a, b in parts))
        if isinstance(tree, int) and not isinstance(tree, bool) and tree != other:
            return self._size(tree, other)
        return tree

    def _size(self, one: int, two: int) -> fx.Node:
        here, there = self._tape, self._twin
        graph = self._graph
        items, tokens = (
            graph.call_function(_items, (self._like(),)),
            graph.call_function(_tokens, (self._like(),)),
        )
        for size, other, made in (
            (here.items, there.items, items),
            (here.tokens, there.tokens, tokens),
            (
                here.items * here.tokens,
                there.items * there.tokens,
                graph.call_function(_product, (items, tokens)),
            ),
        ):
            if one % size == 0 and one // size * other == two:
                return made if one == size else graph.call_function(_product, (made, one // size))
        raise Unreplayable(f"a size of {one} depends on the input in a way that was not understood")

    def _like(self) -> fx.Node:
        """Something whose first axes are items and tokens: the newest, as older ones may be an encoder's."""
        sizes = self._tape.items, self._tape.tokens
        for node in reversed(self._inputs):
            if self._spot(node) is not None and node.tensor.shape[:2] == sizes:
                return self._real[node]
        raise Unreplayable("no tensor that hooks see tells batch size and length")

    # The weights

    def _weights(self) -> fx.Node:
        count, heads = len(self._mix.edges), self._mix.heads
        part = self._mix.node.tensor.shape[-1] // heads
        parts = []
        for first in range(0, count, part):
            some = self._mix.edges[first : first + part]
            self._probes = {(edge.user, edge.slot): channel for channel, edge in enumerate(some)}
            self._done: dict[Node, fx.Node] = {}
            parts.append(
                self._graph.call_function(_leading, (self._probed(self._mix.node), len(some), heads))
            )
        return self._graph.call_function(torch.cat, (parts,)) if len(parts) > 1 else parts[0]

    def _probed(self, node: Node) -> fx.Node:
        """The node with one-hot vectors for the sources, and all else as it was."""
        if node not in self._done:
            operands = self._mix.steps[node]
            carried = {slot: self._operand(node, slot, axis) for slot, axis in operands}
            if node in self._mix.passed:
                self._done[node] = next(iter(carried.values()))
            else:
                slots = [carried.get(slot) or self._emit(each) for slot, each in enumerate(node.slots)]
                kernel = name_of(node) == "scaled_dot_product_attention"
                self._done[node] = self._called(node, slots, _in_float32(node.func) if kernel else None)
        return self._done[node]

    def _operand(self, node: Node, slot: int, axis: int) -> fx.Node:
        child = node.slots[slot]
        channel = self._probes.get((node, slot))
        if channel is None and child in self._mix.steps and not self._is_edge(node, slot):
            return self._probed(child)
        part = self._mix.node.tensor.shape[-1] // self._mix.heads
        return self._graph.call_function(_one_hot, (self._emit(child), axis, channel, part))

    def _is_edge(self, node: Node, slot: int) -> bool:
        return any(edge.user is node and edge.slot == slot for edge in self._mix.edges)


def _drops(node: Node) -> bool:
    """Whether it is its first operand, but for what was dropped out."""
    return "dropout" in getattr(node.func, "__name__", "")


def _refuse_drawing(node: Node) -> None:
    """Training would go on with other random numbers, were any drawn here."""
    if node.draws and not _drops(node):
        raise DrawsNumbers("random numbers are drawn on the way to the weights")


def _within(cast: tuple, func: Callable) -> Callable:
    """`func` in an autocast region, as where a read is computed in float32 whatever is around it."""
    device, dtype, enabled = cast

    def within(*args, **kwargs):
        with torch.autocast(device, dtype, enabled):
            return func(*args, **kwargs)

    return within


def _in_float32(kernel: Callable) -> Callable:
    """An attention kernel, whose weights are float32 within, or finer: what it returns of one-hot vectors is not rounded to the type
    of its operands."""

    def unrounded(*args, **kwargs):
        device = args[0].device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def wide(x):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            x = x if low is None else x.to(low)
            return x.to(torch.promote_types(x.dtype, torch.float32))

        with torch.autocast(device, enabled=False):
            return kernel(*map(wide, args), **{key: wide(x) for key, x in kwargs.items()})

    return unrounded


def _with_item(x: Tensor, key: object, value: object) -> Tensor:
    x = x.clone()
    x[key] = value
    return x


def _items(x: Tensor) -> int:
    return x.shape[0]


def _tokens(x: Tensor) -> int:
    return x.shape[1]


def _product(a: int, b: int) -> int:
    return a * b


def _item(values: tuple, place: int) -> Tensor:
    return values[place]


def _leading(x: Tensor, count: int, heads: int) -> Tensor:
    """[..., D] -> [count, ...], with several heads [count, ..., H]"""
    if heads > 1:
        x = x.unflatten(-1, (heads, -1))
    return x[..., :count].movedim(-1, 0)


def _one_hot(like: Tensor, axis: int, channel: int | None, part: int) -> Tensor:
    """Ones in one channel of each part."""
    probe = torch.zeros_like(like)
    if channel is not None:
        probe[(slice(None),) * axis + (slice(channel, None, part),)] = 1
    return probe


def _of_head(x: Tensor, head: int, part: int) -> Tensor:
    """The channels of one head, or (a part of one channel) its weights."""
    return x[..., head] if part == 1 else x[..., head * part : (head + 1) * part]


def _of_heads(weights: Tensor, sources: list[Tensor]) -> Tensor:
    """Weights [S, ..., H] times sources [..., D]"""
    heads = weights.shape[-1]
    parts = (w.unsqueeze(-1) * x.unflatten(-1, (heads, -1)) for w, x in zip(weights, sources, strict=True))
    return sum(parts).flatten(-2)


def moment_of(tape: Tape, node: Node) -> Moment:
    """When hooks can first look back at `node`: where it is handed over, or the next moment after it was made."""
    if spots := tape.spots.get(node):
        return tape.moments[spots[0].moment]
    return next((moment for moment in tape.moments if moment.nodes > node.index), tape.moments[-1])
