"""One read over depth: softmax over the logits of the sources, and the mix of the sources."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnres.checks import check_count, check_not_negative, check_sources
from attnres.fused import fused_read
from attnres.logits import source_logits


class DepthAttention(nn.Module):
    """One read of AttnRes (Eq. 2-4): a learned query, a key norm's gain, a softmax over `depth_sources`.

    The query starts at zero, so that the first step weighs all sources alike. Both are bare parameters: an
    `apply(init)` over Linear and Embedding weights leaves them alone, and rules for matrices do not fit them.
    """

    def __init__(self, width: int, depth_sources: int, eps: float = 1e-6):
        super().__init__()
        check_count("width", width)
        check_count("depth_sources", depth_sources)
        check_not_negative("eps", eps)
        self.query = nn.Parameter(torch.zeros(width))
        self.gain = nn.Parameter(torch.ones(width))
        self.depth_sources = depth_sources
        self.eps = eps

    def effective_query(self) -> Tensor:
        """gain · query, [D]: all that the two parameters mean to the weights."""
        return self.gain * self.query

    def forward(
        self,
        sources: Sequence[Tensor],
        logits: Sequence[Tensor] | None = None,
        mix: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mix [B, T, D], always a new tensor in the embedding's dtype, and the weights [S, B, T].

        `sources` are S tensors [B, T, D], oldest first. A stream that has worked the logits out already
        gives them, S of [B, T] in float32 or float64; one with another schedule gives all of the `mix`. Otherwise
        a fused kernel reads where there is one (fused.py), and its weights carry no gradient. ValueError where sources or
        logits do not fit the read or one another.
        """
        if mix is not None:
            return mix(sources)
        if logits is None:
            check_sources("sources", sources, len(self.query))
            if len(sources) != self.depth_sources:
                raise ValueError(
                    f"sources must be {self.depth_sources}, the depth_sources of this read, and there are {len(sources)}."
                )
            fused = fused_read(sources)
            if fused is not None:
                return fused(sources, self.query, self.gain, self.eps)
            query = self.effective_query().unsqueeze(0)
            logits = [source_logits(source, query, self.eps)[0] for source in sources]
        elif len(logits) != len(sources) or logits[0].shape != sources[0].shape[:-1]:
            raise ValueError(f"logits must be {len(sources)} tensors [B, T], one for each source.")
        return softmax_mix(sources, logits)

    def get_extra_state(self) -> Tensor:
        """The number of sources, kept with the weights: Full and Block have the same parameters otherwise."""
        return torch.tensor(self.depth_sources)

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError where the state dict belongs to a read over another number of sources."""
        if not state.is_meta and int(state) != self.depth_sources:
            raise ValueError(
                f"This read attends over {self.depth_sources} sources, and the state dict's over {int(state)}: it was "
                "saved from a model with another residual or layers_per_block. Build the model as that one was built."
            )

    def extra_repr(self) -> str:
        return f"width={len(self.query)}, depth_sources={self.depth_sources}, eps={self.eps}"


def softmax_mix(sources: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mix of S sources [B, T, D], in the dtype of the first, and the weights [S, B, T] (Eq. 3-4)."""
    if not torch.compiler.is_compiling():
        return _SoftmaxMix.apply(torch.stack(list(logits)), *sources)
    # The compiler fuses the plain sum and its gradients by itself, and torch 2.13 fails on the function's form where
    # nothing needs a gradient.
    if torch.is_grad_enabled():
        weights = torch.softmax(torch.stack(list(logits)), dim=0)
        return _mixed(weights.unbind(0), sources), weights
    weights = _softmax(logits)
    return _mixed(weights, sources), torch.stack(weights)


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """Over a list, which the compiler need not write out: in a step of generation every write is a call."""
    top = functools.reduce(torch.maximum, [each.detach() for each in logits])
    shares = [(each - top).exp() for each in logits]
    total = functools.reduce(torch.add, shares)
    return [share / total for share in shares]


def _mixed(weights: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    first, *rest = (weight.to(sources[0].dtype).unsqueeze(-1) for weight in weights)
    mix = first * sources[0]
    for share, source in zip(rest, sources[1:], strict=True):
        mix.addcmul_(share, source)
    return mix


class _SoftmaxMix(torch.autograd.Function):
    """An unstacked weighted sum: a stack would copy every source again at every read.

    Its gradients by hand, since autograd would write out more of D channels than it has to.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.softmax(logits, dim=0)
        mix = _mixed(weight.unbind(0), sources)
        ctx.save_for_backward(weight, *sources)
        return mix, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weight: Tensor) -> tuple[Tensor, ...]:
        weight, *sources = ctx.saved_tensors
        along, grads = [], []
        for share, source in zip(weight.to(grad.dtype).unsqueeze(-1).unbind(0), sources, strict=True):
            product = grad * source
            along.append(product.sum(-1, dtype=weight.dtype))
            # Into the memory of the product, which is done with: fresh memory is what takes time here.
            grads.append(torch.mul(share, grad, out=product).to(source.dtype))
        grad_weight = grad_weight + torch.stack(along)
        return weight * (grad_weight - (weight * grad_weight).sum(0)), *grads
