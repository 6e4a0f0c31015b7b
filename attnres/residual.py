"""Residual streams: what carries the sources from layer to layer during one forward pass.

A *residual* is a module chosen by configuration; `open(embedding)` gives a *stream* that lives for one pass:

    stream = residual.open(embedding)        # source 0
    for each layer l = 1..L:
        h = stream.read()                    # state h_l            [B, T, D]
        stream.write(sublayer(norm(h)))      # source l, output v_l [B, T, D]
    final_norm(stream.read())                # the final state

A transformer block reads and writes, and knows no residual type.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from attnres.depth_attention import DepthAttention
from attnres.logits import source_logits


class Stream(Protocol):
    """One forward pass over depth: read, write, read, write, ..., read."""

    def read(self) -> Tensor:
        """The next layer's state, or after the last layer the final state: [B, T, D]."""

    def write(self, output: Tensor) -> None:
        """Add a layer's output [B, T, D] to the stream."""


class PreNorm(nn.Module):
    """The ordinary residual stream: a running sum (Eq. 1). No parameters."""

    def open(self, embedding: Tensor) -> "PreNormStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return PreNormStream(embedding)


class PreNormStream:
    """The running sum of all sources."""

    def __init__(self, embedding: Tensor):
        self.state = embedding

    def read(self) -> Tensor:
        return self.state

    def write(self, output: Tensor) -> None:
        self.state = self.state + output


class Full(nn.Module):
    """Full AttnRes (Eq. 2-4): every read attends over the embedding and all outputs so far."""

    def __init__(self, width: int, layers: int, eps: float = 1e-6):
        super().__init__()
        self.reads = nn.ModuleList(DepthAttention(width, row + 1, eps) for row in range(layers + 1))

    def open(self, embedding: Tensor) -> "FullStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return FullStream(self.reads, embedding)


class Block(nn.Module):
    """Block AttnRes (Eq. 5-6): depth blocks of `layers_per_block` layers, the last one possibly ragged."""

    def __init__(self, width: int, layers: int, layers_per_block: int, eps: float = 1e-6):
        super().__init__()
        self.layers_per_block = layers_per_block
        # The embedding, and every depth block that layer `row` or an earlier one wrote to.
        sources = [1 + -(-row // layers_per_block) for row in range(layers + 1)]
        self.reads = nn.ModuleList(DepthAttention(width, count, eps) for count in sources)

    def open(self, embedding: Tensor) -> "BlockStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return BlockStream(self.reads, embedding, self.layers_per_block)


class FullStream:
    """All sources so far, each with its logits for the reads still to come."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor):
        self.reads = reads
        self.row = 0
        self.queries = torch.stack([read.effective_query() for read in reads])
        self.sources: list[Tensor] = []
        # One list per read: the logits of its sources, oldest first, [B, T] each.
        self.logits: list[list[Tensor]] = [[] for _ in reads]
        self.commit(embedding)

    def commit(self, source: Tensor) -> None:
        """Show a finished source to every read from the next one on."""
        self.sources.append(source)
        self._score(source, len(self.reads))

    def _score(self, source: Tensor, until: int) -> None:
        scores = source_logits(source, self.queries[self.row : until], self.reads[self.row].eps)
        for logits, score in zip(self.logits[self.row : until], scores, strict=True):
            logits.append(score)

    def read(self) -> Tensor:
        # A copy of the list: ours grows, and a hook may keep what it was given.
        mix, _ = self.reads[self.row]([*self.sources], torch.stack(self.logits[self.row]))
        return mix

    def write(self, output: Tensor) -> None:
        self.row += 1
        self.commit(output)


class BlockStream(FullStream):
    """The embedding, finished depth blocks, and the running partial sum of the unfinished one."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor, layers_per_block: int):
        super().__init__(reads, embedding)
        self.layers_per_block = layers_per_block
        self.partial: Tensor | None = None

    def read(self) -> Tensor:
        running = [] if self.partial is None else [self.partial]
        mix, _ = self.reads[self.row]([*self.sources, *running], torch.stack(self.logits[self.row]))
        return mix

    def write(self, output: Tensor) -> None:
        self.row += 1
        # Kept in the embedding's dtype, as the ordinary stream is, whatever autocast makes of outputs.
        self.partial = output.to(self.sources[0].dtype) if self.partial is None else self.partial + output
        if self.row % self.layers_per_block == 0:
            self.commit(self.partial)
            self.partial = None
        else:
            # It will have grown by the read after next, so it gets a logit for the next read only.
            self._score(self.partial, self.row + 1)
