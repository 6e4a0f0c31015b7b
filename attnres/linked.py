"""Sources that get their gradient from all their reads at once, in eager training.

A read's gradient for a source is weight · g [B, T, D], with g the gradient of the read's mix. Written out and added up
for each pair of read and source, these are most of what AttnRes costs. So a read hands back g itself, the same tensor to
all its sources, and its weights beside it; a source adds them up in one pass when all its reads have been through
backward. Both travel along edges of autograd's graph, made for this alone: autograd itself sees to it that all reads of
a backward pass, and no others, have come before their source, whatever was retained, checkpointed or left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres.logits import logits_gradients, logits_of, source_logits


class Link(NamedTuple):
    """What one source shows to one of its reads."""

    source: Tensor
    logit: Tensor
    """[B, T]."""
    share: Tensor
    """[2, B, T], of no numbers: its "gradient" is the read's weight, and 1, so that a row read twice can be told."""
    way: Tensor
    """[B, T, D], of no numbers: its "gradient" is that of the read's mix."""


def scored(
    source: Tensor, queries: Tensor, eps: float, mixed: torch.dtype
) -> Sequence[Link] | Sequence[Tensor]:
    """A link to each read of R effective queries [R, D], for mixes of the dtype `mixed`; where nothing is to be linked,
    the logits alone, [B, T] each."""
    if not torch.is_grad_enabled():
        return source_logits(source, queries, eps)
    outputs = _LinkedSource.apply(source, queries, eps, mixed)
    count = len(queries)
    return [Link(source, *outputs[index::count]) for index in range(count)]


def plain(logits: Sequence[Tensor] | Sequence[Link]) -> list[Tensor]:
    """The logits alone, [B, T] each."""
    return [each.logit if isinstance(each, Link) else each for each in logits]


class _LinkedSource(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, queries: Tensor, eps: float, mixed: torch.dtype) -> tuple[Tensor, ...]:
        logits, scale = logits_of(source, queries, eps)
        ctx.save_for_backward(source, queries, scale, logits)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        count = len(queries)
        shares = [logits.new_zeros(()).expand(2, *source.shape[:-1]) for _ in range(count)]
        ways = [source.new_zeros((), dtype=mixed).expand(source.shape) for _ in range(count)]
        return *logits.view(count, *source.shape[:-1]).unbind(0), *shares, *ways

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        source, queries, scale, logits = ctx.saved_tensors
        count = len(queries)
        nothing, memory = source.new_zeros(source.shape[:-1], dtype=scale.dtype), []
        of_logits, weights, ways = [], [], []
        # None is what a read that this backward pass has not come by has given.
        for logit, share, way in zip(*(grads[at : at + count] for at in (0, count, 2 * count)), strict=True):
            of_logits.append(nothing if logit is None else logit)
            if way is not None:
                weights.append(share[0] / share[1].clamp(min=1))
                ways.append(way)
                of_logits[-1] = of_logits[-1] + weights[-1] * along(way, source, scale.dtype, memory)
        total = weighted_sum(weights, ways) if ways else None
        more = logits_gradients(torch.stack(of_logits), total, source, queries, scale, logits)
        return *more, None, None


def linked_mix(links: Sequence[Link]) -> tuple[Tensor, Tensor]:
    """The mix of S sources [B, T, D], in the dtype of the first, and the weights [S, B, T] (Eq. 3-4)."""
    sources, logits, shares, ways = zip(*links, strict=True)
    return _LinkedMix.apply(torch.stack(logits), *sources, *shares, *ways)


class _LinkedMix(torch.autograd.Function):
    """An unstacked weighted sum: a stack would copy every source again at every read."""

    @staticmethod
    def forward(ctx, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.softmax(logits, dim=0)
        mix = weighted_sum(weight.unbind(0), rest[: len(logits)])
        ctx.save_for_backward(weight, mix)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return mix, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, mix = ctx.saved_tensors
        count = len(weight)
        total = torch.zeros_like(weight) if grad_weight is None else grad_weight
        less, shares = (weight * total).sum(0), [None] * count
        if grad is not None:
            # What each source has along the gradient, it adds itself: it has to go through all of it anyway.
            less = less + along(grad, mix, weight.dtype, [])
            shares = [torch.stack((share, torch.ones_like(share))) for share in weight.unbind(0)]
        return weight * (total - less), *[None] * count, *shares, *[grad] * count


def along(grad: Tensor, source: Tensor, dtype: torch.dtype, memory: list[Tensor]) -> Tensor:
    """grad · source over the channels, [B, T]; calls that share `memory` write their products to one place."""
    if torch.compiler.is_compiling():
        return (grad * source).sum(-1, dtype=dtype)
    # Fresh memory is what takes time here.
    if memory and memory[0].dtype == torch.result_type(grad, source):
        torch.mul(grad, source, out=memory[0])
    else:
        memory[:] = [grad * source]
    return memory[0].sum(-1, dtype=dtype)


def weighted_sum(weights: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """Of S [B, T, D], by S weights [B, T], in the dtype of the first."""
    first, *rest = (weight.to(sources[0].dtype).unsqueeze(-1) for weight in weights)
    mix = first * sources[0]
    for share, source in zip(rest, sources[1:], strict=True):
        mix.addcmul_(share, source)
    return mix
