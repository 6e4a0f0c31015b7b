"""The softmax over depth, and the mix of the sources by it (Eq. 3-4)."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres.linked import Link, along, linked_mix, plain, weighted_sum


def softmax_mix(
    sources: Sequence[Tensor], logits: Sequence[Tensor] | Sequence[Link]
) -> tuple[Tensor, Tensor]:
    """The mix of S sources [B, T, D], in the dtype of the first, and the weights [S, B, T] (Eq. 3-4)."""
    links, logits = [each for each in logits if isinstance(each, Link)], plain(logits)
    # A hook may have put others in their place.
    if len(links) == len(sources) and all(
        link.source is source for link, source in zip(links, sources, strict=True)
    ):
        return linked_mix(links)
    if not torch.compiler.is_compiling():
        return _SoftmaxMix.apply(torch.stack(logits), *sources)
    # The compiler fuses the plain sum and its gradients by itself, and torch 2.13 fails on the function's form where
    # nothing needs a gradient.
    if torch.is_grad_enabled():
        weights = torch.softmax(torch.stack(list(logits)), dim=0)
        return weighted_sum(weights.unbind(0), sources), weights
    weights = _softmax(logits)
    return weighted_sum(weights, sources), torch.stack(weights)


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """Over a list, which the compiler need not write out: in a step of generation every write is a call."""
    top = functools.reduce(torch.maximum, [each.detach() for each in logits])
    shares = [(each - top).exp() for each in logits]
    total = functools.reduce(torch.add, shares)
    return [share / total for share in shares]


class _SoftmaxMix(torch.autograd.Function):
    """As `linked_mix`, of sources without links: a gradient for each pair of read and source."""

    @staticmethod
    def forward(ctx, logits: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.softmax(logits, dim=0)
        ctx.save_for_backward(weight, *sources)
        return weighted_sum(weight.unbind(0), sources), weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weight: Tensor) -> tuple[Tensor, ...]:
        weight, *sources = ctx.saved_tensors
        memory: list[Tensor] = []
        grad_weight = grad_weight + torch.stack([along(grad, each, weight.dtype, memory) for each in sources])
        shares = zip(weight.to(grad.dtype).unsqueeze(-1), sources, strict=True)
        grads = [(share * grad).to(source.dtype) for share, source in shares]
        return weight * (grad_weight - (weight * grad_weight).sum(0)), *grads
