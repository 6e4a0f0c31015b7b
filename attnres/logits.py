"""The logits of one source for every read that will ever see it, in one product.

Queries are parameters, known before the pass starts, so a source meets all of its later queries the moment
it is written: one pass over [B, T, D] instead of one per read.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW_TOKENS = 32
"""As in a step of generation."""


def source_logits(source: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, ...]:
    """q · RMSNorm(source) for R effective queries (Eq. 2): R tensors [B, T].

    `source` is [B, T, D], `queries` [R, D]. float32, or float64 where the source is; also under autocast.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and source[..., 0].numel() <= FEW_TOKENS:
        return _summed(source, queries, eps).unbind(0)
    # One unbind, not R selects: its backward is one stack, theirs would each fill an [R, B, T] of zeros.
    return _SourceLogits.apply(source, queries, eps).unbind(0)


def _summed(source: Tensor, queries: Tensor, eps: float) -> Tensor:
    """The same as plain sums, [R, B, T], which the compiler fuses; for a few tokens a product is a call by itself."""
    wide = source.to(torch.promote_types(source.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    return (queries.to(wide.dtype)[:, None, None] * wide).sum(-1) * scale


class _SourceLogits(torch.autograd.Function):
    """Keeps the source in its own dtype for backward, where autograd would keep a float32 copy, D wide.

    Its gradient has none of its own: asking for a second derivative raises.
    """

    @staticmethod
    def forward(ctx, source: Tensor, queries: Tensor, eps: float) -> Tensor:
        logits, scale = logits_of(source, queries, eps)
        ctx.save_for_backward(source, queries, scale, logits)
        return logits.view(len(queries), *source.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *logits_gradients(grad, None, *ctx.saved_tensors), None


def logits_of(source: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The logits [R, B·T], and each token's inverse RMS [B·T]."""
    with _without_autocast(source):
        rows = _rows(source)
        wide = queries.to(rows.dtype)
        # A norm, squared again: one pass without a square of everything in between.
        scale = torch.rsqrt(torch.linalg.vector_norm(rows, dim=-1).square() / rows.shape[-1] + eps)
        return (wide @ rows.T) * scale, scale


def logits_gradients(
    grad: Tensor, more: Tensor | None, source: Tensor, queries: Tensor, scale: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of source and queries, from that of the logits and `more` of the source [B, T, D], overwritten."""
    with _without_autocast(source):
        rows = _rows(source)
        grad = grad.reshape(len(queries), -1)
        scaled = grad * scale
        # The norm's own part: every logit shrinks as the source grows along itself.
        along = (grad * logits).sum(0) * scale.square() / rows.shape[-1]
        wide = queries.to(rows.dtype)
        if more is None:
            grad_source = scaled.T @ wide
        else:
            grad_source = more.view_as(rows).to(rows.dtype).addmm_(scaled.T, wide)
        grad_source.addcmul_(rows, along.unsqueeze(-1), value=-1)
        grad_queries = scaled @ rows
    return grad_source.view_as(source).to(source.dtype), grad_queries.to(queries.dtype)


def _rows(source: Tensor) -> Tensor:
    """The source as [B·T, D], at least float32."""
    return source.flatten(0, -2).to(torch.promote_types(source.dtype, torch.float32))


def _without_autocast(source: Tensor) -> AbstractContextManager:
    # Meta tensors have no autocast to leave.
    if source.device.type == "meta":
        return nullcontext()
    return torch.autocast(source.device.type, enabled=False)
