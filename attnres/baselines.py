"""Residual streams that others measure against AttnRes: PostNorm, DeepNorm and the rescaled residual.

They stand in the same transformer block as every other stream. In PostNorm and DeepNorm its norms play another part:
the first normalises the embedding, as in BERT, every later one the sum that the layer before left, and the final norm
the last sum. So all residuals have the same shared parameters.
"""

import torch
from torch import Tensor, nn

from attnres.checks import check_count
from attnres.stream import Stream

QUARTER = 1 / 4


class Baseline(nn.Module):
    """A residual without parameters; its name is kept with the weights, for they would fit all the others too."""

    name: str

    def get_extra_state(self) -> Tensor:
        """The name's bytes."""
        return torch.tensor(list(self.name.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the decoder compares it (`name_in`), where all of a state dict has to fit."""


def name_in(state: Tensor) -> str:
    """What `get_extra_state` of a baseline kept."""
    return bytes(state.tolist()).decode()


class PostNorm(Baseline):
    """The residual of the first Transformer: a layer's input is Norm(input + output) of the layer before."""

    name, scale = "postnorm", 1.0

    def open(self, embedding: Tensor) -> "PostNormStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return PostNormStream(embedding, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


class DeepNorm(PostNorm):
    """DeepNorm for a decoder of B transformer blocks (arXiv:2203.00555): Norm(scale · input + output).

    `scale` is (2B)^¼, and `gain` (8B)^-¼ shrinks the initial weights of values, attention outputs and MLPs.
    """

    name = "deepnorm"

    def __init__(self, blocks: int):
        super().__init__()
        check_count("blocks", blocks)
        self.scale = (2 * blocks) ** QUARTER
        self.gain = (8 * blocks) ** -QUARTER

    @torch.no_grad()
    def initialise(self, plain: list[nn.Linear], shrunk: list[nn.Linear]) -> None:
        """Xavier-normal weights: queries and keys are `plain`, everything else in a layer is `shrunk`."""
        for linear in plain:
            nn.init.xavier_normal_(linear.weight)
        for linear in shrunk:
            nn.init.xavier_normal_(linear.weight, gain=self.gain)


class PostNormStream(Stream):
    """scale · what the latest layer was given + what it made of it."""

    def __init__(self, embedding: Tensor, scale: float):
        self.scale = scale
        self.newest = [embedding]

    def read(self) -> Tensor:
        return self.newest[0]

    def write(self, output: Tensor, given: Tensor) -> None:
        self.newest[0] = torch.add(output, given, alpha=self.scale)


class Rescaled(Baseline):
    """The rescaled residual: after layer l the state is l/(l+1) · state + output/(l+1), the mean of all sources."""

    name = "rescaled"

    def open(self, embedding: Tensor) -> "RescaledStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return RescaledStream(embedding)


class RescaledStream(Stream):
    """The mean of all sources so far."""

    def __init__(self, embedding: Tensor):
        self.newest = [embedding]
        self.counts = [1]

    def read(self) -> Tensor:
        return self.newest[0]

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        self.counts[0] += 1
        share = 1 / self.counts[0]
        self.newest[0] = self.newest[0] * (1 - share) + output * share
