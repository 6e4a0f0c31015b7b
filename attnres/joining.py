"""Before a conversion: do a block's layers run one after the other, or side by side? And does the state go on beside them?

One more forward pass in training mode differentiates nothing but the blocks' own code: what their children give stands
there as if it fell from the sky. A gradient then says which children's outputs join the stream directly, and what each
child reads. Side by side are two outputs of one norm that are *added*; where one multiplies the other it is a gate.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnres.trying import first_tensor, run_watched, with_first
from attnres.watching import SEQUENTIAL, ConversionError, WatchedBlock

PARALLEL = "{} and {} run side by side, as in a parallel block: {}"
REPLACED = (
    "{} normalises the stream itself: the state goes on through that norm instead of beside it, as in a post-norm model. "
    "Only PreNorm models can be converted."
)
UNSEEN = (
    "{} reads what {} added to the state, and no norm among the block's children receives that state in its own shape "
    "[B, T, D]: only blocks with such a norm before every layer can be converted."
)


@dataclass(eq=False)
class _Call:
    """One call of a child: the tensors that it was given, and its output, a leaf of the graph."""

    name: str
    given: list[Tensor]
    made: Tensor | None = None


@dataclass
class _Visit:
    """What a block was given, what its children did until now, in the order in which they ended, and what it made of it."""

    given: _Call
    """As if a call had made it."""
    calls: list[_Call] = field(default_factory=list)
    made: Tensor | None = None


def check_sequential(model: nn.Module, args: tuple, kwargs: dict, blocks: Sequence[WatchedBlock]) -> None:
    """ConversionError, naming two layers that run side by side, where there are such."""
    handles = [handle for block in blocks for handle in _watch(block)]
    run_watched(model, args, kwargs, handles)


def _watch(block: WatchedBlock) -> Iterator[torch.utils.hooks.RemovableHandle]:
    visits: list[_Visit] = []
    begun: list[list[Tensor]] = []

    def enter(module, args, kwargs):
        torch.set_grad_enabled(True)
        cut = lambda x: x.detach() if isinstance(x, Tensor) else x  # noqa: E731
        args, kwargs = [cut(x) for x in args], {name: cut(x) for name, x in kwargs.items()}
        holder, key = (args, 0) if block.keyword is None else (kwargs, block.keyword)
        given = _Call(block.name, [], holder[key].requires_grad_())
        visits.append(_Visit(given))
        # Not the leaf itself: the block may add to it in place.
        holder[key] = given.made.clone()
        return tuple(args), kwargs

    def begin(module, args, kwargs):
        if visits:
            begun.append([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
            torch.set_grad_enabled(False)

    def end(name):
        def hook(module, args, output):
            if not visits:
                return None
            call = _Call(name, begun.pop())
            visits[-1].calls.append(call)
            # Where one child calls another, the outer one's gradients stay off.
            torch.set_grad_enabled(not begun)
            made = first_tensor(output)
            if made is None or not made.is_floating_point():
                return None
            call.made = made.detach().clone().requires_grad_()
            return with_first(output, call.made.clone())

        return hook

    def leave(module, args, output):
        visit = visits.pop()
        visit.made = first_tensor(output)
        _check(block, visit)
        torch.set_grad_enabled(False)
        return with_first(output, visit.made.detach())

    yield block.module.register_forward_pre_hook(enter, with_kwargs=True)
    for name, child in block.module.named_children():
        yield child.register_forward_pre_hook(begin, with_kwargs=True)
        yield child.register_forward_hook(end(name))
    yield block.module.register_forward_hook(leave)


def _check(block: WatchedBlock, visit: _Visit) -> None:
    starts = [layer.norm_call for layer in block.layers]
    carrying = [visit.given]
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(visit.calls)], strict=True)):
        is_last = end == len(visit.calls)
        state = visit.made if is_last else visit.calls[end].given[0]
        layer = visit.calls[start:end]
        # A child may be given the state to add to.
        for call in layer[1:]:
            if any(_reads(call, earlier) for earlier in carrying):
                carrying.append(call)
        if not any(_reaches(call, state) for call in carrying):
            raise ConversionError(REPLACED.format(f"{block.name}.{layer[0].name}"))
        readers = _readers(layer)
        joined = [call for call in layer[1:] if _reaches(call, state)]
        if not joined and not is_last:
            raise ConversionError(
                PARALLEL.format(block.layers[index].name, block.layers[index + 1].name, SEQUENTIAL)
            )
        for call in joined[:-1]:
            pair = (call, joined[-1])
            if not all(each in readers for each in pair) or not _are_added(*pair, state):
                continue
            if joined[-1] in _readers(layer[layer.index(call) :]):
                raise ConversionError(
                    UNSEEN.format(*(f"{block.name}.{each.name}" for each in reversed(pair)))
                )
            names = (f"{block.name}.{_first(each, layer).name}" for each in pair)
            raise ConversionError(PARALLEL.format(*names, SEQUENTIAL))


def _reaches(call: _Call, x: Tensor) -> bool:
    """Whether the block's own code made x of the call's output, among other things."""
    if call.made is None or not x.requires_grad:
        return False
    return torch.autograd.grad(x.sum(), call.made, retain_graph=True, allow_unused=True)[0] is not None


def _reads(call: _Call, earlier: _Call) -> bool:
    return any(_reaches(earlier, x) for x in call.given)


def _readers(layer: list[_Call]) -> list[_Call]:
    """The first call, and those that get to see what it gave, if only through one another."""
    found = layer[:1]
    for call in layer[1:]:
        if any(_reads(call, earlier) for earlier in found):
            found.append(call)
    return found


def _first(call: _Call, layer: list[_Call]) -> _Call:
    """The one that read the norm, on the way to this call."""
    while not _reads(call, layer[0]):
        call = next(each for each in layer[1:] if _reads(call, each))
    return call


def _are_added(one: _Call, other: _Call, state: Tensor) -> bool:
    """Whether the state grows with the one by as much whatever the other is."""
    with suppress(RuntimeError):
        (slope,) = torch.autograd.grad(state.sum(), one.made, create_graph=True)
        return not _reaches(other, slope)
    return False
