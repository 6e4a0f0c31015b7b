"""One read of AttnRes as the paper's pseudocode calls it (Fig. 2), for models that hold queries and norms themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnres.depth_attention import softmax_mix
from attnres.fused import fused_read
from attnres.logits import source_logits


def block_attn_res(
    blocks: Sequence[Tensor], partial_block: Tensor | None, proj: nn.Linear, norm: nn.Module
) -> Tensor:
    """The state [B, T, D] that a layer of Block AttnRes reads (Eq. 6).

    `blocks` are the embedding and the finished depth blocks, [B, T, D] each, and `partial_block` the running sum of
    the unfinished one: None at its first layer. `proj` is `Linear(D, 1, bias=False)`, its weight the query, zero at
    the start; `norm` normalises the keys. ValueError where sources or `proj` do not fit.
    """
    running = [] if partial_block is None else [partial_block]
    return full_attn_res([*blocks, *running], proj, norm)


def full_attn_res(sources: Sequence[Tensor], proj: nn.Linear, norm: nn.Module) -> Tensor:
    """The state [B, T, D] that a layer of Full AttnRes reads (Eq. 2-4): `sources` are the embedding and all outputs.

    `proj` and `norm` as in `block_attn_res`; ValueError where sources or `proj` do not fit.
    """
    _check(sources, proj)
    fused = fused_read(sources)
    # Exactly this class, here and below: what somebody made of it may compute something else.
    if fused is not None and type(norm) is nn.RMSNorm and norm.weight is not None:
        return fused(sources, proj.weight[0], norm.weight, _eps(norm, sources[0]))[0]
    logits = torch.stack([_logit(source, proj.weight, norm) for source in sources])
    return softmax_mix(sources, logits)[0]


def _logit(source: Tensor, query: Tensor, norm: nn.Module) -> Tensor:
    """query · norm(source), [B, T]."""
    if type(norm) is nn.RMSNorm:
        effective = query if norm.weight is None else query * norm.weight
        return source_logits(source, effective, _eps(norm, source))[0]
    key = norm(source)
    wide = torch.promote_types(key.dtype, torch.float32)
    return F.linear(key.to(wide), query.to(wide)).squeeze(-1)


def _eps(norm: nn.RMSNorm, source: Tensor) -> float:
    return torch.finfo(source.dtype).eps if norm.eps is None else norm.eps


def _check(sources: Sequence[Tensor], proj: nn.Linear) -> None:
    if not sources:
        raise ValueError("blocks must hold at least the embedding, the first source of every read.")
    shapes = {tuple(source.shape) for source in sources}
    if len(shapes) > 1:
        raise ValueError(f"All sources must have one shape [B, T, D], and these have {sorted(shapes)}.")
    width = sources[0].shape[-1]
    if tuple(proj.weight.shape) != (1, width) or proj.bias is not None:
        raise ValueError(
            f"proj must be Linear({width}, 1, bias=False) for sources of width {width}, not {proj}."
        )
