"""Layers that no transformer blocks hold: the module around them adds them up itself."""

from dataclasses import replace

from torch import nn

from probes.dataflow import follow_within
from probes.layers import layers_of, place_in, working
from probes.naming import blocks_of
from probes.nodes import has_matrix
from probes.stacks import UNCALLED, Stack, followed_from_above, has_wide_matrix
from probes.symbols import Untraceable


def find_sublayers(root: nn.Module) -> Stack:
    """A list of sublayers without blocks, which the module that holds it adds up. Untraceable, with the reason, where there
    is none."""
    reason = "no list in it holds sublayers"
    for path, container in root.named_modules():
        members = {f"{path}.{key}" if path else key: child for key, child in container.named_children()}
        if (
            not isinstance(container, UNCALLED)
            or not members
            or not all(map(has_wide_matrix, members.values()))
        ):
            continue
        try:
            stack = followed_from_above(root, path, members)
        except Untraceable as error:
            reason = f"what is done around {path} was not followed: {error}"
            continue
        missing = set(range(1, len(members) + 1)) - {site.layer.block for site in stack.layers}
        if not missing:
            return _paired_up(stack)
        reason = f"{len(missing)} of the {len(members)} members of {path} do not add to one stream"
    raise Untraceable(reason)


def find_inline(root: nn.Module) -> Stack:
    """The layers that a module adds up in its own forward, whoever holds them. Untraceable, with the reason, where that
    holds but a small part of the model's matrices, or cannot be followed."""
    matrices = {m for m in root.modules() if has_matrix(m, recurse=False) and not isinstance(m, nn.Embedding)}
    reason, followed = "", ""
    for path, holder in root.named_modules():
        if isinstance(holder, UNCALLED) or not _most(matrices, [holder]):
            continue
        where = f"the forward of {path or type(root).__name__}"
        try:
            flow = follow_within(holder, tokens=True)
        except Untraceable as error:
            reason = f"{where} was not followed: {error}"
            continue
        layers = [[call.module for call in working(term.calls)] for term in flow.terms]
        if len(layers) < 2 or not all(layers) or not _most(matrices, [m for each in layers for m in each]):
            followed = followed or f"the stream in {where} goes past most of its matrices"
        elif flow.end is None:
            followed = f"no module is given the final state in {where}"
        else:
            sites = tuple(layers_of(path, holder, replace(flow, norm=None), 0, lambda term: 1, within=True))
            final = place_in(path, flow.end, is_input=True)
            return _paired_up(Stack(f"{path}." if path else "", 1, sites, final, flow.change), by_name=True)
    raise Untraceable(followed or reason)


def _most(matrices: set[nn.Module], modules: list[nn.Module]) -> bool:
    """Whether more than half of the modules with matrices are among these and below them."""
    return 2 * len(matrices & {below for module in modules for below in module.modules()}) > len(matrices)


def _paired_up(stack: Stack, by_name: bool = False) -> Stack:
    """Attention and the MLP after it are one transformer block."""
    blocks = blocks_of(
        [(site.layer.name if by_name else f"{site.layer.block}", site.layer.kind) for site in stack.layers]
    )
    layers = tuple(
        replace(site, layer=replace(site.layer, block=block))
        for site, block in zip(stack.layers, blocks, strict=True)
    )
    return replace(stack, blocks=blocks[-1], layers=layers)
