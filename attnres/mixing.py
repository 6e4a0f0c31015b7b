"""The softmax over depth, and the mix of the sources by it (Eq. 3-4)."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnres.linked import Link, plain, weighted_sum


def softmax_mix(
    sources: Sequence[Tensor], logits: Sequence[Tensor] | Sequence[Link]
) -> tuple[Tensor, Tensor]:
    """The mix of S sources [B, T, D], in the dtype of the first, and the weights [S, B, T] (Eq. 3-4)."""
    links, logits = [each for each in logits if isinstance(each, Link)], plain(logits)
    if not torch.compiler.is_compiling():
        shares, ways = (), ()
        # A hook may have put others in their place.
        if len(links) == len(sources) and all(
            link.source is source for link, source in zip(links, sources, strict=True)
        ):
            shares, ways = zip(*((link.share, link.way) for link in links), strict=True)
        return _SoftmaxMix.apply(torch.stack(logits), *sources, *shares, *ways)
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
    """An unstacked weighted sum: a stack would copy every source again at every read.

    Its gradients by hand, since autograd would write out more of D channels than it has to. Where the sources are linked,
    they get theirs over the links.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        sources = rest[: len(logits)]
        ctx.linked = len(rest) > len(logits)
        ctx.set_materialize_grads(False)
        weight = torch.softmax(logits, dim=0)
        ctx.save_for_backward(weight, *sources)
        return weighted_sum(weight.unbind(0), sources), weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        nothing = [None] * len(sources)
        total = torch.zeros_like(weight) if grad_weight is None else grad_weight
        if grad is not None:
            total = total + _along(grad, sources, weight.dtype)
        grad_logits = weight * (total - (weight * total).sum(0))
        if grad is None:
            return grad_logits, *nothing, *(2 * nothing if ctx.linked else ())
        if ctx.linked:
            shares = torch.stack((weight, torch.ones_like(weight)), dim=1).unbind(0)
            return grad_logits, *nothing, *shares, *[grad for _ in sources]
        pairs = zip(weight.to(grad.dtype).unsqueeze(-1), sources, strict=True)
        return grad_logits, *((share * grad).to(source.dtype) for share, source in pairs)


def _along(grad: Tensor, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """grad · source over the channels, [S, B, T]."""
    memory, along = None, []
    for source in sources:
        # Into the same memory each time: fresh memory is what takes time here.
        if memory is None or memory.dtype != torch.result_type(grad, source):
            memory = torch.mul(grad, source)
        else:
            torch.mul(grad, source, out=memory)
        along.append(memory.sum(-1, dtype=dtype))
    return torch.stack(along)
