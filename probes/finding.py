"""Find the sites of a model by itself, or where the user says they are."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from probes.declared import declared
from probes.foreign import foreign_sites
from probes.inline import find_inline, find_sublayers
from probes.layout import Layer
from probes.manifest import RunError
from probes.names import matching
from probes.parallel import is_parallel
from probes.pipeline import reads_in
from probes.queries import may_read
from probes.sites import LayerSite, Place, Sites, unwrap
from probes.stacks import Stack, find_stacks, is_norm, is_read, stack_at
from probes.symbols import Untraceable

_BY_HAND = (
    "name the modules yourself: layers=[patterns of sublayers], norms=[patterns of each layer's norm and the final norm]; "
    "where norms are functions, mark states and outputs with probes.mark and give layers= their number"
)


def find_sites(
    model: nn.Module,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
    staged: bool = False,
    example: object = None,
) -> Sites:
    """The sites of `model`. Raises RunError, naming what was looked for, when none are recognised.

    `stack` chooses among several lists of transformer blocks. `layers` and `norms` are patterns over
    `named_modules()` that say what the sublayers are, and which modules receive each layer's state and the final one;
    a number of `layers` is for a model that marks them itself (marks.py). `example` is what the model may be called with. With `staged`, the model is one stage of a pipeline,
    which may end without a norm.
    """
    if not isinstance(model, nn.Module):
        raise RunError(f"A {type(model).__name__} is not a torch.nn.Module: pass the model that is trained.")
    root = unwrap(model)
    _one_device(root)
    if isinstance(layers, int):
        found = _marked(layers)
    elif (layers is None) != (norms is None):
        raise RunError(
            "Give layers= and norms= together: the one says what is added, the other what it is added to."
        )
    elif layers is not None:
        found = declared(root, layers, norms)
    elif stack is not None:
        members = [_stack(root, *each) for each in matching(root, stack, "stack").items()]
        found = _joined(root, members, staged)
    else:
        found = _only_stack(root, staged, example)
        if isinstance(found, Sites):
            return found
    reads = [module for module in root.modules() if is_read(module)]
    if reads and len(reads) != len(found.layers) + 1:
        if staged:
            raise reads_in(root)
        raise RunError(
            f"{type(root).__name__} has {len(found.layers)} layers and {len(reads)} depth reads: expected one read "
            "per layer and the final read."
        )
    norm = _final_norm(root, found.path) if found.path else None
    outputs = tuple(
        module for module in root.modules() if isinstance(getattr(module, "depth_output", None), int)
    )
    holders = tuple(module for name, module in _above(root, found.path) if name)
    ends = found.final is not None and not found.final.is_input
    receiver = norm if ends and not reads and not staged else None
    sites = Sites(
        root,
        list(found.layers),
        found.final,
        reads,
        found.change,
        holders,
        outputs,
        found.entry,
        norm and norm.module,
        staged=staged,
        named=isinstance(layers, str | Sequence),
        receiver=receiver,
    )
    return _called(sites)


def _called(sites: Sites) -> Sites:
    """The same with the module that training calls. Lightning calls the training step of its module, and no forward but
    that of the model inside."""
    if not hasattr(sites.root, "training_step"):
        return sites
    places = [
        sites.final,
        sites.receiver,
        *(each for s in sites.layers for each in (s.state, s.output, s.after)),
    ]
    made = [made for s in sites.layers for made in (s.state_made, s.output_made) if made is not None]
    places += [leaf for each in made for leaf in each.leaves]
    seen = {place.module for place in places if place is not None} | {*sites.reads, *sites.outputs}
    for child in sites.root.children():
        if seen <= set(child.modules()):
            inner = unwrap(child)
            holders = tuple(m for m in sites.holders if m not in (child, inner))
            return dataclasses.replace(sites, inner=inner, holders=holders)
    return sites


def _one_device(root: nn.Module) -> None:
    devices = {str(parameter.device) for parameter in root.parameters()}
    if len(devices) > 1:
        raise RunError(
            f"{type(root).__name__} is spread over {', '.join(sorted(devices))}: depthscope records models "
            "that are on one device."
        )


def _only_stack(root: nn.Module, staged: bool, example: object) -> Stack | Sites:
    """The one stack of a model, or its sites where its states are depth reads."""
    if staged:
        return _followed_stack(root, staged)  # what it is given is not known, and so it cannot be run
    own = any(map(is_read, root.modules()))
    try:
        found = _followed_stack(root)
    except RunError as error:
        try:
            return _called(foreign_sites(root, example))
        except Untraceable as other:
            reasons = f"As for depth reads: {other}."
            for what, find in (
                ("sublayers without blocks", find_sublayers),
                ("what it adds up itself", find_inline),
            ):
                try:
                    return _joined(root, [find(root)])
                except Untraceable as another:
                    reasons += f" As for {what}: {another}."
            raise RunError(f"{error} {reasons}") from None
    # A forward of a model that is spread over processes takes all of them, and is for those that need it.
    if not own and ((found.guessed and not is_parallel(root)) or may_read(root, found)):
        with suppress(Untraceable):
            sites = foreign_sites(root, example)
            # What reads several streams is no depth read; it may look like one for some of the layers.
            alike = not found.change or len(sites.layers) <= len(found.layers)
            if alike:
                return _called(sites)
    return found


def _followed_stack(root: nn.Module, staged: bool = False) -> Stack:
    stacks, reasons = find_stacks(root)
    if not stacks:
        seen = f" Not followed: {'; '.join(reasons[:3])}." if reasons else ""
        raise RunError(
            f"No transformer layers were found in {type(root).__name__}: depthscope looks for a list of blocks that "
            f"each add to what they are given.{seen} Pass the module that holds the blocks, or {_BY_HAND}."
        )
    if len(stacks) > 1:
        raise RunError(
            f"{type(root).__name__} has {len(stacks)} stacks of transformer blocks: {', '.join(map(str, stacks))}. "
            f"Choose one with stack={stacks[-1].path!r}."
        )
    return _joined(root, stacks, staged)


def _stack(root: nn.Module, path: str, container: nn.Module) -> Stack:
    try:
        found = stack_at(root, path, container)
    except Untraceable as error:
        raise RunError(f"stack={path!r} cannot be followed ({error}): {_BY_HAND}.") from error
    if found is None:
        raise RunError(
            f"stack={path!r} is not a list of blocks that each add to what they are given: {_BY_HAND}."
        )
    return found


def _joined(root: nn.Module, stacks: list[Stack], staged: bool = False) -> Stack:
    """Stacks one after the other as one; of a `staged` model the final state may be another's to see."""
    first, *rest = stacks
    for stack in rest:
        count, blocks = len(first.layers), first.blocks
        moved = tuple(_moved(site, count, blocks) for site in stack.layers)
        change = first.change or stack.change
        layers = first.layers + moved
        mixes = first.mixes or stack.mixes
        first = Stack(first.path, blocks + stack.blocks, layers, stack.final, change, first.entry, mixes)
    final = first.final or _final_norm(root, first.path)
    if final is None and not staged:
        raise RunError(
            f"{type(root).__name__} has layers in {first.path!r} but no norm after them, so the final state cannot "
            f"be seen: {_BY_HAND}."
        )
    return dataclasses.replace(first, final=final)


def _moved(site: LayerSite, layers: int, blocks: int) -> LayerSite:
    layer = Layer(site.layer.index + layers, site.layer.kind, site.layer.block + blocks, site.layer.name)
    return dataclasses.replace(site, layer=layer, given=site.given + layers)


def _final_norm(root: nn.Module, path: str) -> Place | None:
    """What the last norm beside the stack receives, in the module that holds it or in one around that."""
    for name, module in reversed(_above(root, path)):
        beside = [(key, child) for key, child in module.named_children() if is_norm(child)]
        if beside:
            key, norm = beside[-1]
            return Place(f"{name}.{key}" if name else key, norm, is_input=True)
    return None


def _above(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules that a path leads through, the root first, without the last."""
    parts = path.split(".")[:-1]
    names = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    return [(name, root.get_submodule(name)) for name in names]


def _marked(count: int) -> Stack:
    """Layers that nothing but the author's marks shows."""
    if count < 1:
        raise RunError(f"layers={count}: give the number of layers that the model marks, 1 or more.")
    layers = (Layer(index, "layer", index, f"marked {index}") for index in range(1, count + 1))
    sites = tuple(LayerSite(layer, None, None, None, layer.index, ()) for layer in layers)
    return Stack("", count, sites, None)
