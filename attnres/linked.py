"""Sources that get their gradient from all their reads at once, in eager training.

A read's gradient for a source is weight · g [B, T, D], with g the gradient of the read's mix. Written out and added up
for each pair of read and source, these are most of what AttnRes costs. So a read hands back g itself, the same tensor to
all its sources, and its weights beside it; a source adds them up in one pass when all its reads have been through
backward. Both travel along edges of autograd's graph, made for this alone: autograd itself sees to it that all reads of
a backward pass, and no others, have come before their source, whatever was retained, checkpointed or left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres.logits import logits_gradients, logits_of, source_logits


@dataclass(frozen=True, eq=False, slots=True)
class Link:
    """What one source shows to one of its reads. No tuple, which those who look through a module's arguments would open."""

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
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
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
        ctx.set_materialize_grads(False)
        shape, count = source.shape[:-1], len(queries)
        shares = [logits.new_zeros(()).expand(2, *shape) for _ in range(count)]
        ways = [source.new_zeros((), dtype=mixed).expand(source.shape) for _ in range(count)]
        return *logits.view(count, *shape).unbind(0), *shares, *ways

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        source, queries, scale, logits = ctx.saved_tensors
        count = len(queries)
        # None is what a read that this backward pass has not come by has given.
        nothing = scale.new_zeros(source.shape[:-1])
        of_logits = [nothing if each is None else each for each in grads[:count]]
        shares = [share for share in grads[count : 2 * count] if share is not None]
        ways = [way for way in grads[2 * count :] if way is not None]
        total = None
        if ways and ctx.needs_input_grad[0]:
            weights = torch.stack(shares, dim=1)
            total = weighted_sum((weights[0] / weights[1]).to(ways[0].dtype).unbind(0), ways)
        more = logits_gradients(torch.stack(of_logits), total, source, queries, scale, logits)
        return *more, None, None


def weighted_sum(weights: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """Of S [B, T, D], by S weights [B, T], in the dtype of the first."""
    first, *rest = (weight.to(sources[0].dtype).unsqueeze(-1) for weight in weights)
    mix = first * sources[0]
    for share, source in zip(rest, sources[1:], strict=True):
        mix.addcmul_(share, source)
    return mix
