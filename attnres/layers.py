"""The layers of the decoder: grouped-query attention with rotary positions, SwiGLU, and the block of both."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnres.cache import Memory
from attnres.config import DecoderConfig
from attnres.stream import Stream


class Rotary(nn.Module):
    """Rotary positions: turns pairs of channels by an angle that grows with the position."""

    def __init__(self, head_width: int, context: int, base: float):
        super().__init__()
        pairs = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
        angles = torch.arange(context, dtype=torch.float64).outer(base**-pairs)
        self.register_buffer("cosine", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sine", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, H, T, head width] to the same, in the same dtype; `positions` [T] are 0..T-1 where not given."""
        where = slice(x.shape[-2]) if positions is None else positions
        cosine, sine = self.cosine[where], self.sine[where]
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
        return turned.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention, [B, T, D] to [B, T, D]."""

    def __init__(self, config: DecoderConfig, rotary: Rotary):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        kv_width = config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.rotary = rotary

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """With a memory, x continues the tokens in it."""
        positions = None if memory is None else memory.positions
        query = self.rotary(_split(self.query(x), self.heads), positions)
        key = self.rotary(_split(self.key(x), self.kv_heads), positions)
        value = _split(self.value(x), self.kv_heads)
        sight = {"is_causal": True}
        if memory is not None:
            key, value = memory.extended(key, value)
            sight = {"attn_mask": memory.mask}
        grouped = self.kv_heads != self.heads
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **sight)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated MLP, [B, T, D] to [B, T, D]."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up = nn.Linear(config.width, config.hidden_width, bias=False)
        self.output = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """Two layers, attention and MLP, each with its pre-norm."""

    def __init__(self, config: DecoderConfig, rotary: Rotary):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, rotary)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, stream: Stream, memory: Memory | None = None) -> None:
        """Read a state and write an output, twice."""
        given = stream.read_through(self.attention_norm)
        stream.write(self.attention(given, memory), given)
        given = stream.read_through(self.mlp_norm)
        stream.write(self.mlp(given), given)


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, H·W] to [B, H, T, W]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
