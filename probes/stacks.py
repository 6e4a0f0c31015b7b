"""Find the stacks of a model: lists of transformer blocks, and the layers of each, from the modules alone.

A list is a stack when its members add to a stream: their forward is followed (dataflow.py), or, where that cannot be,
each holds as many norms as sublayers and the k-th norm feeds the k-th sublayer. No class or package is known by name.
"""

import inspect
from dataclasses import dataclass, replace

from torch import nn

from probes.dataflow import follow, follow_within
from probes.feeding import feeding
from probes.flow import Call, Flow, Term
from probes.layers import kind_of, layers_of, made_in, named, place_in, working
from probes.layout import Layer
from probes.sites import LayerSite, Place
from probes.symbols import Untraceable

UNCALLED = nn.ModuleList | nn.ModuleDict  # they have no forward
_LISTS = UNCALLED | nn.Sequential


@dataclass(frozen=True)
class Stack:
    """One list of transformer blocks: its layers in order, where the state after them is seen, and what else happens
    to its stream than layers adding to it."""

    path: str
    blocks: int
    layers: tuple[LayerSite, ...]
    final: Place | None
    change: str = ""
    entry: Place | None = None  # where the embedding is seen, if that is not the first state
    mixes: bool = False  # its blocks mix several streams
    guessed: bool = False  # nobody has followed what its blocks do with their norms and sublayers

    def __str__(self) -> str:
        return f"{self.path!r} ({self.blocks} blocks)"


def find_stacks(root: nn.Module) -> tuple[list[Stack], list[str]]:
    """The outermost stacks of `root`, and for each list that is none why its first member could not be followed."""
    stacks: list[Stack] = []
    reasons: list[str] = []
    done: list[str] = []
    for path, container in root.named_modules():
        if path.startswith(tuple(f"{outer}." for outer in done)) or not isinstance(container, _LISTS):
            continue
        try:
            stack = stack_at(root, path, container)
        except Untraceable as error:
            reasons.append(f"{path} ({error})")
            if any(isinstance(member, UNCALLED) for member in container.children()):
                done.append(path)  # the lists within are its blocks, not stacks
        else:
            if stack is not None:
                stacks.append(stack)
                done.append(path)
    adding = [stack for stack in stacks if not stack.mixes]
    return adding or stacks, reasons


def stack_at(root: nn.Module, path: str, container: nn.Module) -> Stack | None:
    """The stack that a list is; None where its members are no blocks. Untraceable where they might be."""
    members = {f"{path}.{key}" if path else key: _bare(child) for key, child in container.named_children()}
    # What holds no more than rows, as queries are, is no block.
    if not members or not all(map(has_wide_matrix, members.values())):
        return None
    if any(isinstance(member, UNCALLED) for member in members.values()):
        return followed_from_above(root, path, members)
    try:
        flows = {name: follow(member) for name, member in members.items()}
    except Untraceable as error:
        paired = _paired(path, members) or _fed(path, members)
        if paired is None and any(list(member.children()) for member in members.values()):
            raise Untraceable(str(error)) from error
        return paired
    if all(_reads_streams(member, flows[name]) for name, member in members.items()):
        return _fed(path, members)
    layers: list[LayerSite] = []
    for block, (name, member) in enumerate(members.items(), 1):
        layers += layers_of(name, member, flows[name], len(layers), lambda term, block=block: block)
    change = next((flow.change for flow in flows.values() if flow.change), "")
    change = change or next((f"changed by {flow.norm.name}" for flow in flows.values() if flow.norm), "")
    last = next(reversed(members))
    final = Place(last, members[last], is_input=False, key=flows[last].result)
    (name, member), flow = next(iter(members.items())), next(iter(flows.values()))
    changed = flow.terms[0].changed and not flow.terms[0].begins  # before the first layer reads it
    entry = Place(name, member, is_input=True, keyword=flow.argument) if changed else None
    return Stack(path, len(members), tuple(layers), final, change, entry)


def followed_from_above(root: nn.Module, path: str, members: dict[str, nn.Module]) -> Stack:
    """A list of lists: nobody calls its members, so the forward of the module that holds it is followed. Untraceable
    where that fails."""
    above = path.rpartition(".")[0]
    holder = root.get_submodule(above)
    flow = follow_within(holder)
    prefix = f"{above}." if above else ""

    def block_of(term: Term) -> int:
        names = [f"{prefix}{call.name}." for call in term.calls]
        return next((i for i, m in enumerate(members, 1) if any(n.startswith(f"{m}.") for n in names)), 0)

    if not all(map(block_of, flow.terms)):
        raise Untraceable("what is added to the stream around it is not made by its blocks alone")
    final = place_in(above, flow.norm, is_input=True) if flow.norm is not None else None
    layers = tuple(layers_of(above, holder, replace(flow, norm=None), 0, block_of, within=True))
    return Stack(path, len(members), layers, final, flow.change)


def _bare(member: nn.Module) -> nn.Module:
    """A member from under a wrapper that only hands its arguments on."""
    while len(children := list(member.children())) == 1 and not list(member.parameters(recurse=False)):
        arguments = inspect.signature(member.forward).parameters.values()
        if not all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in arguments):
            break
        member = children[0]
    return member


# Where a forward cannot be followed


def _paired(path: str, members: dict[str, nn.Module]) -> Stack | None:
    """Norms and sublayers of each block in the order in which they are children: the k-th norm feeds the k-th."""
    layers: list[LayerSite] = []
    for block, (name, member) in enumerate(members.items(), 1):
        pairs = _pairs(member)
        if not pairs:
            return None
        for norm_name, norm, child_name, child in pairs:
            state = Place(f"{name}.{norm_name}", norm, is_input=True)
            output = Place(f"{name}.{child_name}", child, is_input=False)
            kind = kind_of([Call(child_name, child)])
            index = len(layers) + 1
            layer = Layer(index, kind, block, f"{name}.{child_name}")
            layers.append(LayerSite(layer, state, output, None, index, (child, norm)))
    entry = entry_of(*next(iter(members.items())))
    return Stack(path, len(members), tuple(layers), None, entry=entry, mixes=entry is not None, guessed=True)


def _fed(path: str, members: dict[str, nn.Module]) -> Stack | None:
    """Blocks that mix several streams: what their norms receive and their sublayers return. None where they do not."""
    layers: list[LayerSite] = []
    try:
        feedings = {name: feeding(member) for name, member in members.items()}
    except Untraceable:
        return None
    for block, (name, each) in enumerate(feedings.items(), 1):
        for fed in each.layers:
            index, calls = len(layers) + 1, working(fed.fed)
            layer = Layer(index, kind_of(calls), block, named(name, calls))
            output = place_in(name, fed.fed[-1], is_input=False)
            modules = tuple(call.module for call in (fed.norm, *fed.fed) if call is not None)
            site = LayerSite(layer, None, output, None, index, modules, sums=False)
            if fed.norm is not None:
                site = replace(site, state=place_in(name, fed.norm, is_input=True))
            elif isinstance(fed.state, Call):
                site = replace(site, state=place_in(name, fed.state, is_input=False))
            else:
                site = replace(site, state_made=made_in(name, members[name], fed.state))
            layers.append(site)
    entry = entry_of(*next(iter(members.items())))
    return Stack(path, len(members), tuple(layers), None, "mixed by its blocks", entry, mixes=True)


def _reads_streams(block: nn.Module, flow: Flow) -> bool:
    """Whether a block adds to several streams, of which its layers read one."""
    try:
        return feeding(block).reads([term.state for term in flow.terms])
    except Untraceable:
        return False


def entry_of(name: str, block: nn.Module) -> Place | None:
    """Where the first block is given the embedding, if it is known to mix it with what its sublayers make."""
    try:
        return Place(name, block, is_input=True, keyword=feeding(block).argument)
    except Untraceable:
        return None


def _pairs(block: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """(name of norm, norm, name of sublayer, sublayer) of each layer in a block; empty when they do not pair up."""
    children = [
        (name, child)
        for name, child in block.named_children()
        if (_has_parameters(child) or is_norm(child)) and not is_read(child)
    ]
    norms = [(name, child) for name, child in children if is_norm(child)]
    sublayers = [(name, child) for name, child in children if not is_norm(child)]
    if not norms or len(norms) != len(sublayers):
        return []
    return [(*norm, *sublayer) for norm, sublayer in zip(norms, sublayers, strict=True)]


def is_read(module: nn.Module) -> bool:
    """Whether a module is a depth read (docs/architecture.md)."""
    return isinstance(getattr(module, "depth_sources", None), int)


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm: torch's, or a leaf whose only parameters are a gain and perhaps a bias."""
    if is_read(module):
        return False
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    parameters = list(module.parameters())
    return not list(module.children()) and 1 <= len(parameters) <= 2 and all(p.ndim == 1 for p in parameters)


def has_wide_matrix(module: nn.Module) -> bool:
    """Whether it holds a matrix of several rows and columns."""
    return any(p.ndim > 1 and min(p.shape) > 1 for p in module.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
