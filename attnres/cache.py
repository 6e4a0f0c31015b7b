"""Keys and values of the tokens so far, so that generation computes each token once.

The depth state needs no cache: it begins and ends with each token's own forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnres.config import DecoderConfig


@dataclass(frozen=True)
class Memory:
    """One attention's keys and values [B, kv heads, capacity, head width], and where the pass at hand stands."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    """Of the tokens of this pass, [T]."""
    mask: Tensor
    """Which positions each of them may see, [T, capacity]."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of this pass [B, kv heads, T, head width] written in place."""
        self.keys.index_copy_(2, self.positions, key.to(self.keys.dtype))
        self.values.index_copy_(2, self.positions, value.to(self.values.dtype))
        return self.keys.to(key.dtype), self.values.to(value.dtype)


class Cache:
    """The memories of all attentions of a decoder, of fixed size: one compiled step serves every position.

    `queries` are the effective ones of AttnRes, [R, D]: worked out once for all passes, whose parameters are the same.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        like: Tensor,
        queries: Tensor | None = None,
    ):
        self.queries = queries
        shape = (batch, config.kv_heads, capacity, config.head_width)
        self.keys = [like.new_zeros(shape) for _ in range(config.blocks)]
        self.values = [like.new_zeros(shape) for _ in range(config.blocks)]
        self.length = torch.zeros((), dtype=torch.long, device=like.device)
        """Tokens so far; on the device, so that nobody waits for it."""

    def advance(self, count: int) -> list[Memory]:
        """Make room for the `count` tokens of one pass; one memory for each transformer block."""
        positions = self.length + torch.arange(count, device=self.length.device)
        capacity = torch.arange(self.keys[0].shape[2], device=self.length.device)
        mask = capacity <= positions.unsqueeze(-1)
        self.length.add_(count)
        return [Memory(*pair, positions, mask) for pair in zip(self.keys, self.values, strict=True)]
