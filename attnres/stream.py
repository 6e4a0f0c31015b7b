"""What every residual stream is: an object that lives for one forward pass over depth."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn


class Stream(ABC):
    """One forward pass over depth: read, write, read, write, ..., read."""

    @abstractmethod
    def read(self) -> Tensor:
        """The next layer's state, or after the last layer the final state: [B, T, D]."""

    def read_through(self, norm: nn.Module) -> Tensor:
        """norm(read()): a stream may prefer to compute it once more in backward to keeping the state."""
        return norm(self.read())

    @abstractmethod
    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        """Add a layer's output [B, T, D] to the stream.

        `given` is the normalised state that the layer made it from: streams with norms in them carry it on.
        """


class Residual(Protocol):
    """A module that opens streams."""

    def open(self, embedding: Tensor) -> Stream:
        """The stream of one pass, from the embedding [B, T, D]."""
