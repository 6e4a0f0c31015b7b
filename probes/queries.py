"""Whether a model has parameters like depth queries, so that it is worth running it to see what it reads."""

from torch import nn

from probes.stacks import Stack, is_norm


def may_read(root: nn.Module, stack: Stack) -> bool:
    """Whether a model whose layers were followed may have depth reads all the same: it has vectors as wide as its
    stream that belong to no norm, are no bias and no embeddings, as queries are."""
    matrices = [
        p
        for site in stack.layers
        for p in (*site.parameters, *(q for m in site.modules for q in m.parameters()))
    ]
    inside = set(matrices)
    widths = {p.shape[-1] for p in matrices if p.ndim == 1} or {p.shape[-1] for p in matrices if p.ndim > 1}
    for module in root.modules():
        if is_norm(module) or isinstance(module, nn.Embedding):
            continue
        for name, p in module._parameters.items():
            if p is None or name == "bias" or p.shape[-1:] == ():
                continue
            slim = (
                p.ndim == 1
                or 1 in p.shape
                or (p.ndim == 2 and p not in inside and len(p) <= 2 * len(stack.layers) + 4)
            )
            if slim and p.ndim <= 3 and (p.shape[-1] in widths or p.numel() in widths & {*p.shape}):
                return True
    return False
