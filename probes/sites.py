"""Find where a model's layers are, from its modules alone: no class or package is known by name.

A transformer stack is a list of alike blocks, each of which holds as many norms as sublayers; the k-th norm
feeds the k-th sublayer. Depth reads are modules that say how many sources they attend over
(docs/architecture.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch._dynamo import OptimizedModule

from probes.layout import Layer, Layout
from probes.manifest import RunError


@dataclass(frozen=True)
class LayerSite:
    """Layer `layer`: `norm` receives its state h_l, `sublayer` returns its output v_l."""

    layer: Layer
    norm: nn.Module
    sublayer: nn.Module


@dataclass(frozen=True)
class Sites:
    """Every place of one model that is tapped. `reads` is empty for a plain residual, else L+1 modules."""

    root: nn.Module
    layers: list[LayerSite]
    final_norm: nn.Module
    reads: list[nn.Module]

    @property
    def layout(self) -> Layout:
        counts = [read.depth_sources for read in self.reads] or None
        return Layout.build([site.layer for site in self.layers], counts)

    def layer_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each layer: sublayer, pre-norm and depth query; shared ones count once, first."""
        reads = self.reads[:-1] or [None] * len(self.layers)
        seen: set[nn.Parameter] = set()
        grouped = []
        for site, read in zip(self.layers, reads, strict=True):
            modules = [site.sublayer, site.norm, *([read] if read is not None else [])]
            own = [p for module in modules for p in module.parameters() if p not in seen]
            seen.update(own)
            grouped.append(list(dict.fromkeys(own)))
        return grouped


def find_sites(model: nn.Module) -> Sites:
    """The sites of `model`. Raises RunError, naming what was looked for, when none are recognised."""
    if not isinstance(model, nn.Module):
        raise RunError(f"A {type(model).__name__} is not a torch.nn.Module: pass the model that is trained.")
    root = unwrap(model)
    stacks = [
        (path, blocks)
        for path, blocks in root.named_modules()
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and _is_stack(blocks)
    ]
    if not stacks:
        raise RunError(
            f"No transformer layers were found in {type(root).__name__}: depthscope looks for a ModuleList "
            "of blocks that each hold a norm and a sublayer (attention or MLP) per layer. Pass the module "
            "that holds the stack."
        )
    path, blocks = max(stacks, key=lambda stack: len(stack[1]))
    layers = list(_layers(path, blocks))
    final_norm = _final_norm(root, path)
    if final_norm is None:
        raise RunError(
            f"{type(root).__name__} has layers in {path!r} but no norm after them, so the final state cannot "
            "be seen."
        )
    devices = {str(parameter.device) for parameter in root.parameters()}
    if len(devices) > 1:
        raise RunError(
            f"{type(root).__name__} is spread over {', '.join(sorted(devices))}: depthscope records models "
            "that are on one device."
        )
    reads = [module for module in root.modules() if _is_read(module)]
    if reads and len(reads) != len(layers) + 1:
        raise RunError(
            f"{type(root).__name__} has {len(layers)} layers and {len(reads)} depth reads: expected one read "
            "per layer and the final read."
        )
    return Sites(root, layers, final_norm, reads)


def unwrap(model: nn.Module) -> nn.Module:
    """The module the user wrote, from under torch.compile and data parallelism."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            if len(getattr(model, "device_ids", None) or []) > 1:
                raise RunError(
                    "DataParallel over several devices cannot be recorded: use DistributedDataParallel."
                )
            model = model.module
        else:
            return model


def _is_stack(blocks: nn.Module) -> bool:
    members = list(blocks.children())
    return bool(members) and all(_pairs(member) for member in members)


def _pairs(block: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(norm, name of sublayer, sublayer) of each layer in a block; empty when they do not pair up."""
    children = [
        (name, child)
        for name, child in block.named_children()
        if (_has_parameters(child) or _is_norm(child)) and not _is_read(child)
    ]
    norms = [child for _, child in children if _is_norm(child)]
    sublayers = [(name, child) for name, child in children if not _is_norm(child)]
    if not norms or len(norms) != len(sublayers):
        return []
    return [(norm, name, child) for norm, (name, child) in zip(norms, sublayers, strict=True)]


def _layers(path: str, blocks: nn.Module) -> Iterator[LayerSite]:
    index = 0
    for position, (key, block) in enumerate(blocks.named_children(), 1):
        for norm, name, sublayer in _pairs(block):
            index += 1
            layer = Layer(index, _kind(name), position, f"{path}.{key}.{name}" if path else f"{key}.{name}")
            yield LayerSite(layer, norm, sublayer)


def _kind(name: str) -> str:
    lowered = name.lower()
    if any(word in lowered for word in ("attn", "attention", "mixer")):
        return "attention"
    return "mlp"


def _final_norm(root: nn.Module, path: str) -> nn.Module | None:
    """The last norm beside the stack, in its parent module or in the root."""
    parent = root.get_submodule(path.rpartition(".")[0])
    for module in (parent, root):
        beside = [child for child in module.children() if _is_norm(child)]
        if beside:
            return beside[-1]
    return None


def _is_read(module: nn.Module) -> bool:
    return isinstance(getattr(module, "depth_sources", None), int)


def _is_norm(module: nn.Module) -> bool:
    if _is_read(module):
        return False
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    # A norm somebody wrote: a leaf whose only parameters are one gain and perhaps one bias, both vectors.
    parameters = list(module.parameters())
    return not list(module.children()) and 1 <= len(parameters) <= 2 and all(p.ndim == 1 for p in parameters)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
