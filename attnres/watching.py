"""Find the layers of somebody's model by watching one forward pass: no class or package is known by name.

A *stack* is a list of transformer blocks. In each block, a pre-norm is a child that receives the state itself and whose
output does not change when its input doubles. All that runs after it, up to the next pre-norm, is one layer; the
layer's *tail* is the last child in it, whose output joins the stream.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnres.norms import is_adaptive_norm, is_norm
from attnres.trying import first_tensor, run_watched

SEQUENTIAL = (
    "only blocks whose layers run one after the other can be converted. Build the model with such blocks, if its "
    "configuration has a setting for that."
)


class ConversionError(ValueError):
    """A model that cannot be converted, in one sentence that names the layer and says what to do."""


@dataclass(frozen=True)
class WatchedLayer:
    """One layer of a block: `norm` receives its state, `tail` gives its output."""

    name: str
    norm: nn.Module
    norm_name: str
    """Of the block's child."""
    norm_call: int
    """The call of `norm` among those of all the block's children, in the order in which they end, from 0."""
    tail: nn.Module
    tail_name: str
    """Of the block's child."""
    tail_call: int
    """The call of `tail` since the norm, from 0, that ends the layer."""
    tail_calls: int
    """How often `tail` is called in the whole block."""
    state: Tensor
    """What the norm received while we watched, detached."""


@dataclass(frozen=True)
class WatchedBlock:
    """One transformer block of the stack, `keyword` naming the argument that carries the state (None: the first)."""

    name: str
    module: nn.Module
    keyword: str | None
    layers: list[WatchedLayer]
    untried: tuple[str, ...]
    """Its children that did not run, in this block or in another."""
    output: Tensor
    """The state that it returned, detached."""


@dataclass
class _Call:
    """One call of a child of a block."""

    name: str
    module: nn.Module
    given: Tensor | None
    made: Tensor | None
    is_given_state: bool
    """Whether no other child made what it was given: then the block's own code did, or was given it."""
    is_norm: bool

    def __post_init__(self):
        # A block may add to a tensor in place, which then is another value.
        self.made_version = None if self.made is None else self.made._version


@dataclass
class _Visit:
    """One call of a block: what it was given, what its children did, what it made of it."""

    keyword: str | None
    given: Tensor | None
    calls: list[_Call] = field(default_factory=list)
    made: Tensor | None = None
    runs: bool = True


def watch(model: nn.Module, args: tuple, kwargs: dict) -> list[WatchedBlock]:
    """The transformer blocks of the model and their layers, from one forward pass on the example.

    ConversionError where there are none, or where they are not PreNorm.
    """
    lists = [
        (path, container)
        for path, container in model.named_modules()
        if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential) and len(container) > 0
    ]
    members = {
        member: f"{path}.{key}" if path else key for path, c in lists for key, member in c.named_children()
    }
    visits: dict[nn.Module, list[_Visit]] = {member: [] for member in members}
    handles = [handle for member in members for handle in _watch_member(member, visits[member])]
    run_watched(model, args, kwargs, handles)
    for _, container in lists:
        _check_all_ran(list(container.children()), members, visits)
    found = _joined([stack for _, container in lists for stack in _stacks(container, visits)], visits)
    longest = max(found, key=len, default=None)
    if longest is None:
        contents = [list(container.children()) for _, container in lists]
        raise ConversionError(_nothing_found(model, contents, members, visits))
    _check_only([members[each[0]] for each in found if not _is_inside(each, longest)], members[longest[0]])
    ran = {call.module for each in visits.values() for visit in each for call in visit.calls}
    found_blocks = [
        _block(members[member], member, visits[member], ran, member is longest[0]) for member in longest
    ]
    if len(found_blocks) < 2:
        raise ConversionError(
            f"{found_blocks[0].name} is the only transformer block: a depth of one has nothing to mix."
        )
    _check_own_norms(found_blocks)
    return found_blocks


def _stacks(container: nn.Module, visits: dict[nn.Module, list[_Visit]]) -> list[list[nn.Module]]:
    """The stack that a list of modules is, or those in a Sequential, where an embedding, a norm and a head may stand too."""
    members = list(container.children())
    if not isinstance(container, nn.Sequential):
        return [members] if _is_stack(members, visits) else []
    groups = itertools.groupby(members, lambda member: _is_stack([member], visits))
    return [list(group) for are_blocks, group in groups if are_blocks]


def _joined(stacks: list[list[nn.Module]], visits: dict[nn.Module, list[_Visit]]) -> list[list[nn.Module]]:
    """The same with those in one that the state passes through directly, one after the other, as T5's blocks."""
    joined: list[list[nn.Module]] = []
    for stack in stacks:
        if joined and visits[stack[0]][0].given is visits[joined[-1][-1]][0].made:
            joined[-1] = [*joined[-1], *stack]
        else:
            joined.append(stack)
    return joined


def _check_all_ran(
    stack: list[nn.Module], names: dict[nn.Module, str], visits: dict[nn.Module, list[_Visit]]
) -> None:
    """Some blocks ran and others did not: LayerDrop, and which ones it leaves out changes from step to step."""
    ran = [member for member in stack if visits[member]]
    missing = [names[member] for member in stack if not visits[member]]
    if missing and ran and _is_stack(ran, visits):
        raise ConversionError(
            f"{missing[0]} was left out of a forward pass in training mode, as under LayerDrop, and an AttnRes model needs "
            "every block in every pass: set the model's layerdrop to 0 before you convert it."
        )


def _nothing_found(
    model: nn.Module,
    stacks: list[list[nn.Module]],
    names: dict[nn.Module, str],
    visits: dict[nn.Module, list[_Visit]],
) -> str:
    """Why not, by the name of a block without a norm in the longest list that has the state passed along it."""
    lists = [each for each in stacks if all(_keeps_shape(visits[member]) for member in each)]
    longest = max(lists, key=len, default=[])
    if len(longest) > 1 and any(longest[0].children()):
        bare = next(member for member in longest if not _is_stack([member], visits))
        return (
            f"{names[bare]} has no norm among its children, as in a post-norm model, or where norms are inside the "
            "sublayers: only PreNorm models whose blocks hold norms and sublayers side by side can be converted."
        )
    return (
        f"No transformer blocks were found in {type(model).__name__}: convert looks for a list of them (ModuleList, ModuleDict "
        "or Sequential) whose children include the norms and the sublayers. Convert the module that holds such a list."
    )


def _is_inside(stack: list[nn.Module], outer: list[nn.Module]) -> bool:
    """Whether it is the other one, or part of one of its blocks."""
    return any(module is stack[0] for member in outer for module in member.modules())


def _check_only(others: list[str], first: str) -> None:
    """An encoder beside a decoder, or stages: the rest would stay as it was, without a word.

    Stacks have the name of their list, or that of their first block where they are in the list of the longest.
    """
    if others:
        held = first.rpartition(".")[0]
        others = [name if name.rpartition(".")[0] == held else name.rpartition(".")[0] for name in others]
        raise ConversionError(
            f"{', '.join(others)} {'is a stack' if len(others) == 1 else 'are stacks'} of transformer blocks beside the "
            "longest one, and convert changes a single stack: pass the module that holds the one you mean alone."
        )


def _check_own_norms(blocks: list[WatchedBlock]) -> None:
    """A hook on a norm has to know which layer it is called for."""
    owners: dict[nn.Module, str] = {}
    for block in blocks:
        for layer in block.layers:
            name = f"{block.name}.{layer.norm_name}"
            if layer.norm in owners:
                raise ConversionError(
                    f"The norm of {layer.name}, {name}, is that of {owners[layer.norm]} too: give each layer a norm of its "
                    "own, copy.deepcopy(norm) where they are to start alike."
                )
            owners[layer.norm] = layer.name


def _watch_member(member: nn.Module, visits: list[_Visit]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def enter(module, args, kwargs):
        keyword, state = _state(args, kwargs)
        visits.append(_Visit(keyword, state))

    def leave(module, args, output):
        visits[-1].made, visits[-1].runs = first_tensor(output), False

    yield member.register_forward_pre_hook(enter, with_kwargs=True)
    for name, child in member.named_children():

        def called(module, args, kwargs, output, name=name):
            if visits and visits[-1].runs:
                _, given = _state(args, kwargs)
                made = first_tensor(output)
                calls = visits[-1].calls
                is_given_state = given is not None and not any(
                    given is call.made and given._version == call.made_version for call in calls
                )
                norm = is_norm(module, args, kwargs, made) or (
                    is_given_state and is_adaptive_norm(module, args, kwargs, made)
                )
                calls.append(_Call(name, module, given, made, is_given_state, norm))

        yield child.register_forward_hook(called, with_kwargs=True)
    yield member.register_forward_hook(leave)


def _state(args: tuple, kwargs: dict) -> tuple[str | None, Tensor | None]:
    """The first floating-point tensor among the arguments, and its keyword."""
    if args:
        return None, args[0] if isinstance(args[0], Tensor) else None
    for keyword, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return keyword, value
    return None, None


def _is_stack(members: list[nn.Module], visits: dict[nn.Module, list[_Visit]]) -> bool:
    """Whether every member ran, on a state, and has norms and sublayers as children."""
    return all(
        _keeps_shape(visits[member]) and {call.is_norm for call in visits[member][0].calls} == {True, False}
        for member in members
    )


def _keeps_shape(visits: list[_Visit]) -> bool:
    """Whether a member ran, was given a tensor, and made one of the same shape."""
    if not visits or visits[0].given is None or visits[0].made is None:
        return False
    return visits[0].made.shape == visits[0].given.shape


def _block(
    name: str, module: nn.Module, visits: list[_Visit], ran: set[nn.Module], is_first: bool
) -> WatchedBlock:
    if len(visits) != 1:
        raise ConversionError(
            f"{name} is called {len(visits)} times in one forward pass, and a converted block must be once."
        )
    (visit,) = visits
    starts = [index for index, call in enumerate(visit.calls) if _reads_state(visit, index)]
    if is_first and _begins_with_identity(visit):
        starts.insert(0, 0)
    _check_prenorm(name, visit, starts)
    ends = [*starts[1:], len(visit.calls)]
    layers = [_layer(name, visit, start, end) for start, end in zip(starts, ends, strict=True)]
    untried = tuple(child for child, part in module.named_children() if part not in ran)
    return WatchedBlock(name, module, visit.keyword, layers, untried, visit.made.detach())


def _reads_state(visit: _Visit, index: int) -> bool:
    """Whether this call is a norm of the state, not of some child's output, as in a sandwich of norms."""
    call = visit.calls[index]
    return call.is_norm and call.is_given_state and call.given.shape == visit.given.shape


def _begins_with_identity(visit: _Visit) -> bool:
    """Whether the first layer has an Identity for its norm: the embedding, which it reads alone, was normalised before."""
    if not visit.calls or _reads_state(visit, 0):
        return False
    return visit.calls[0].given is visit.given is visit.calls[0].made


def _check_prenorm(name: str, visit: _Visit, starts: list[int]) -> None:
    before = visit.calls[: starts[0]] if starts else visit.calls
    for call in before:
        if call.given is visit.given:
            raise ConversionError(
                f"{name}.{call.name} reads the state without a norm before it, as in a post-norm model: only PreNorm "
                "models can be converted."
            )
    if not starts or visit.calls[starts[0]].given is not visit.given:
        raise ConversionError(
            f"{name} has no norm that reads the state it is given: only PreNorm models can be converted."
        )
    states = [visit.calls[start].given for start in starts]
    for earlier, later, start in zip(states, states[1:], starts[1:], strict=False):
        if earlier is later:
            raise ConversionError(
                f"{name}.{visit.calls[start].name} reads the same state as the norm before it, as in a parallel block: "
                f"{SEQUENTIAL}"
            )


def _layer(name: str, visit: _Visit, start: int, end: int) -> WatchedLayer:
    norm, segment = visit.calls[start], visit.calls[start + 1 : end]
    if not segment:
        raise ConversionError(
            f"{name}.{norm.name} is followed by no sublayer whose output could join the stream."
        )
    shaped = [call for call in segment if call.made is not None and call.made.shape == visit.given.shape]
    # Of another shape where the block's own code gives it that of the state, as after experts.
    tail = (shaped or segment)[-1]
    readers = [call for call in segment if call.given is norm.made]
    tail_call = sum(call.module is tail.module for call in segment) - 1
    tail_calls = sum(call.module is tail.module for call in visit.calls)
    sublayer = readers[0] if readers else tail
    return WatchedLayer(
        name=f"{name}.{sublayer.name}",
        norm=norm.module,
        norm_name=norm.name,
        norm_call=start,
        tail=tail.module,
        tail_name=tail.name,
        tail_call=tail_call,
        tail_calls=tail_calls,
        state=norm.given.detach(),
    )
