"""One read of AttnRes as the paper's pseudocode calls it (Fig. 2), for models that hold queries and norms themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnres.checks import check_sources, described
from attnres.fused import fused_read
from attnres.linked import Link, scored
from attnres.mixing import softmax_mix


def block_attn_res(
    blocks: Sequence[Tensor], partial_block: Tensor | None, proj: nn.Linear, norm: nn.Module
) -> Tensor:
    """The state [B, T, D] that a layer of Block AttnRes reads (Eq. 6).

    `blocks` are the embedding and the finished depth blocks, [B, T, D] each, and `partial_block` the running sum of
    the unfinished one: None at its first layer. `proj` is `Linear(D, 1, bias=False)`, its weight the query, zero at
    the start; `norm` normalises the keys. ValueError where sources, `proj` or `norm` do not fit.
    """
    if not isinstance(blocks, list | tuple | Tensor):
        raise ValueError(f"blocks must be a list of tensors [B, T, D], not {described(blocks)}.")
    running = [] if partial_block is None else [partial_block]
    check_sources("blocks and partial_block", [*blocks, *running])
    return full_attn_res([*blocks, *running], proj, norm)


def full_attn_res(sources: Sequence[Tensor], proj: nn.Linear, norm: nn.Module) -> Tensor:
    """The state [B, T, D] that a layer of Full AttnRes reads (Eq. 2-4): `sources` are the embedding and all outputs.

    `proj` and `norm` as in `block_attn_res`; ValueError where sources, `proj` or `norm` do not fit.
    """
    _check(sources, proj, norm)
    fused = fused_read(sources)
    # Exactly this class, here and below: what somebody made of it may compute something else.
    if fused is not None and type(norm) is nn.RMSNorm and norm.weight is not None:
        return fused(sources, proj.weight[0], norm.weight, _eps(norm, sources[0]))[0]
    logits = [_logit(source, proj.weight, norm, sources[0].dtype) for source in sources]
    return softmax_mix(sources, logits)[0]


def _logit(source: Tensor, query: Tensor, norm: nn.Module, mixed: torch.dtype) -> Tensor | Link:
    """query · norm(source), [B, T], or a link with it, for a mix of this dtype."""
    if type(norm) is nn.RMSNorm:
        effective = query if norm.weight is None else query * norm.weight
        return scored(source, effective, _eps(norm, source), mixed)[0]
    key = norm(source)
    if key.shape != source.shape:
        raise ValueError(
            f"norm must keep the shape of a source, {list(source.shape)}, and made {list(key.shape)} of it."
        )
    wide = torch.promote_types(key.dtype, torch.float32)
    return F.linear(key.to(wide), query.to(wide)).squeeze(-1)


def _eps(norm: nn.RMSNorm, source: Tensor) -> float:
    # Torch's own where there is none: that of the dtype it computes in, not of the source's.
    wide = torch.promote_types(source.dtype, torch.float32)
    return torch.finfo(wide).eps if norm.eps is None else norm.eps


def _check(sources: Sequence[Tensor], proj: nn.Linear, norm: nn.Module) -> None:
    check_sources("sources", sources)
    width = sources[0].shape[-1]
    fits = isinstance(proj, nn.Linear) and tuple(proj.weight.shape) == (1, width) and proj.bias is None
    if not fits:
        raise ValueError(
            f"proj must be Linear({width}, 1, bias=False) for sources of width {width}, not {proj if isinstance(proj, nn.Module) else described(proj)}."
        )
    if not callable(norm):
        raise ValueError(
            f"norm must be a module that normalises the keys, such as RMSNorm({width}), not {described(norm)}."
        )
    if tuple(getattr(norm, "normalized_shape", (width,))) != (width,):
        raise ValueError(f"norm must normalise {width} channels for sources of width {width}, not {norm}.")
