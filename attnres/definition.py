"""Attention Residuals as the paper writes them (arXiv:2603.15031), as plainly as possible.

Nothing here is fast and nothing is trained: this is the twin that the fast streams in `residual.py` are
tested against, output by output and gradient by gradient. Every function works in the dtype it is given; give
it float64.

A *layer* is one sublayer with its own pre-norm: a function from a state [B, T, D] to an output [B, T, D].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DepthPass:
    """What one forward pass over depth leaves behind."""

    states: list[Tensor]
    """h_1..h_L, what each layer was given, [B, T, D] each."""
    final_state: Tensor
    """What the final norm is given, [B, T, D]."""
    outputs: list[Tensor]
    """f_1(h_1)..f_L(h_L), [B, T, D] each."""
    weights: list[Tensor]
    """Row l-1 is layer l's read, row L the final read: [S, B, T] over its S sources, oldest first.

    Empty where a state is no weighted sum of sources, that is with norms in the stream."""


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gain: x / sqrt(mean(x²) + eps) over the last dimension."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def depth_attention(query: Tensor, sources: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """One read: the mix [B, T, D] and the weights [S, B, T] (Eq. 2-4).

    `query` [D] is the effective query, the key norm's gain times the learned query. Keys are normalised,
    values are not, and there is no 1/sqrt(D).
    """
    values = torch.stack(list(sources))
    logits = rms_norm(values, eps) @ query
    weight = torch.softmax(logits, dim=0)
    return (weight.unsqueeze(-1) * values).sum(0), weight


def prenorm(embedding: Tensor, layers: Sequence[Layer]) -> DepthPass:
    """The ordinary residual stream: a state is the sum of all sources so far, every weight one (Eq. 1)."""

    def read() -> tuple[Tensor, Tensor]:
        sources = torch.stack([embedding, *outputs])
        return sources.sum(0), torch.ones_like(sources[..., 0])

    states: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for layer in layers:
        state, weight = read()
        states.append(state)
        weights.append(weight)
        outputs.append(layer(state))
    final_state, weight = read()
    return DepthPass(states, final_state, outputs, [*weights, weight])


def full(embedding: Tensor, layers: Sequence[Layer], queries: Sequence[Tensor], eps: float) -> DepthPass:
    """Full AttnRes: every layer attends over the embedding and all earlier outputs (Eq. 2-4).

    `queries` has L + 1 effective queries, the last one for the final read.
    """
    states, outputs, weights = [], [], []
    for layer, query in zip(layers, queries[:-1], strict=True):
        state, weight = depth_attention(query, [embedding, *outputs], eps)
        states.append(state)
        weights.append(weight)
        outputs.append(layer(state))
    final_state, weight = depth_attention(queries[-1], [embedding, *outputs], eps)
    return DepthPass(states, final_state, outputs, [*weights, weight])


def block(
    embedding: Tensor, layers: Sequence[Layer], queries: Sequence[Tensor], layers_per_block: int, eps: float
) -> DepthPass:
    """Block AttnRes: a layer attends over the embedding, the finished depth blocks and its own block so far.

    A depth block is the plain sum of its layers' outputs (Eq. 5-6); the last one may be ragged. The embedding
    is a source of its own, b_0, in no depth block. The final read sees it and all depth blocks.
    """

    def sources() -> list[Tensor]:
        starts = range(0, len(outputs), layers_per_block)
        return [embedding, *(torch.stack(outputs[i : i + layers_per_block]).sum(0) for i in starts)]

    states: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for layer, query in zip(layers, queries[:-1], strict=True):
        state, weight = depth_attention(query, sources(), eps)
        states.append(state)
        weights.append(weight)
        outputs.append(layer(state))
    final_state, weight = depth_attention(queries[-1], sources(), eps)
    return DepthPass(states, final_state, outputs, [*weights, weight])


def post_norm(
    embedding: Tensor, sublayers: Sequence[Layer], norms: Sequence[Layer], scale: float = 1.0
) -> DepthPass:
    """PostNorm, and with another `scale` DeepNorm: x_{l+1} = Norm_{l+1}(scale · x_l + f_l(x_l)), x_1 = Norm_1(embedding).

    `sublayers` are without a norm of their own, `norms` has one for each, its input being the state; the last one,
    Norm_{L+1}, is the model's final norm, left to the caller.
    """
    states, outputs = [embedding], []
    for sublayer, norm in zip(sublayers, norms, strict=True):
        given = norm(states[-1])
        outputs.append(sublayer(given))
        states.append(scale * given + outputs[-1])
    return DepthPass(states[:-1], states[-1], outputs, [])


def rescaled(embedding: Tensor, layers: Sequence[Layer]) -> DepthPass:
    """The rescaled residual: h_{l+1} = l/(l+1) · h_l + f_l(h_l)/(l+1), so that every state is the mean of its sources."""
    states, outputs = [embedding], []
    for number, layer in enumerate(layers, 1):
        outputs.append(layer(states[-1]))
        states.append(number / (number + 1) * states[-1] + outputs[-1] / (number + 1))
    weights = [
        torch.full((count, *embedding.shape[:-1]), 1 / count).to(embedding)
        for count in range(1, len(states) + 1)
    ]
    return DepthPass(states[:-1], states[-1], outputs, weights)
