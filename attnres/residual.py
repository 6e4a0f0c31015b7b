"""Residual streams: what carries the sources from layer to layer during one forward pass.

A *residual* is a module chosen by configuration; `open(embedding)` gives a *stream* that lives for one pass:

    stream = residual.open(embedding)        # source 0
    for each layer l = 1..L:
        h = stream.read()                    # state h_l            [B, T, D]
        stream.write(sublayer(norm(h)))      # source l, output v_l [B, T, D]
    final_norm(stream.read())                # the final state

A transformer block reads and writes, and knows no residual type. Streams keep what changes in lists: where somebody
registers tensor hooks in a compiled forward, torch 2.13 forgets attributes of Python objects that it bound anew.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from attnres.depth_attention import DepthAttention
from attnres.logits import source_logits
from attnres.schedules import SCHEDULES, StackStream, TwoPhaseStream


class Stream(Protocol):
    """One forward pass over depth: read, write, read, write, ..., read."""

    def read(self) -> Tensor:
        """The next layer's state, or after the last layer the final state: [B, T, D]."""

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        """Add a layer's output [B, T, D] to the stream.

        `given` is the normalised state that the layer made it from: streams with norms in them carry it on.
        """


class Residual(Protocol):
    """A module that opens streams."""

    def open(self, embedding: Tensor) -> Stream:
        """The stream of one pass, from the embedding [B, T, D]."""


class PreNorm(nn.Module):
    """The ordinary residual stream: a running sum (Eq. 1). No parameters."""

    def open(self, embedding: Tensor) -> "PreNormStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return PreNormStream(embedding)


class PreNormStream:
    """The running sum of all sources."""

    def __init__(self, embedding: Tensor):
        self.newest = [embedding]

    def read(self) -> Tensor:
        return self.newest[0]

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        self.newest[0] = self.newest[0] + output


class Full(nn.Module):
    """Full AttnRes (Eq. 2-4): every read attends over the embedding and all outputs so far."""

    def __init__(self, width: int, layers: int, eps: float = 1e-6):
        super().__init__()
        self.reads = nn.ModuleList(DepthAttention(width, row + 1, eps) for row in range(layers + 1))
        self.schedule = "no_stack"
        """The order of the arithmetic; see schedules.py."""

    def open(self, embedding: Tensor) -> Stream:
        """The stream of one pass, from the embedding [B, T, D]; ValueError for an unknown schedule."""
        return _opened(self, embedding, 1, lambda: FullStream(self.reads, embedding))


class Block(nn.Module):
    """Block AttnRes (Eq. 5-6): depth blocks of `layers_per_block` layers, the last one possibly ragged."""

    def __init__(self, width: int, layers: int, layers_per_block: int, eps: float = 1e-6):
        super().__init__()
        self.layers_per_block = layers_per_block
        counts = [block_sources(row, layers_per_block) for row in range(layers + 1)]
        self.reads = nn.ModuleList(DepthAttention(width, count, eps) for count in counts)
        self.schedule = "no_stack"
        """The order of the arithmetic; see schedules.py."""

    def open(self, embedding: Tensor) -> Stream:
        """The stream of one pass, from the embedding [B, T, D]; ValueError for an unknown schedule."""
        size = self.layers_per_block
        return _opened(self, embedding, size, lambda: BlockStream(self.reads, embedding, size))


def _opened(
    residual: Full | Block, embedding: Tensor, layers_per_block: int, no_stack: Callable[[], Stream]
) -> Stream:
    if residual.schedule == "no_stack":
        return no_stack()
    if residual.schedule == "stack":
        return StackStream(residual.reads, embedding, layers_per_block)
    if residual.schedule == "two_phase":
        return TwoPhaseStream(residual.reads, embedding, layers_per_block)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {residual.schedule!r}.")


def block_sources(written: int, layers_per_block: int) -> int:
    """How many sources a read has after `written` layers: the embedding, and every depth block begun by then."""
    return 1 + -(-written // layers_per_block)


class FullStream:
    """All sources so far, each with its logits for the reads still to come."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor):
        self.queries = torch.stack([read.effective_query() for read in reads])
        self.reads = list(reads)
        """Those still to come, the next one first."""
        self.sources: list[Tensor] = []
        # One list per read still to come: the logits of its sources, oldest first, [B, T] each.
        self.logits: list[list[Tensor]] = [[] for _ in reads]
        self.commit(embedding)

    def commit(self, source: Tensor) -> None:
        """Show a finished source to every read from the next one on."""
        self.sources.append(source)
        self._score(source, len(self.reads))

    def _score(self, source: Tensor, count: int) -> None:
        """Give the next `count` reads their logits of the source."""
        row = len(self.queries) - len(self.reads)
        scores = source_logits(source, self.queries[row : row + count], self.reads[0].eps)
        for logits, score in zip(self.logits[:count], scores, strict=True):
            logits.append(score)

    def _advance(self) -> None:
        """The next layer has been read for."""
        self.reads.pop(0)
        self.logits.pop(0)

    def read(self) -> Tensor:
        # A copy of the list: ours grows, and a hook may keep what it was given.
        mix, _ = self.reads[0]([*self.sources], torch.stack(self.logits[0]))
        return mix

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        self._advance()
        self.commit(output)


class BlockStream(FullStream):
    """The embedding, finished depth blocks, and the running partial sum of the unfinished one."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor, layers_per_block: int):
        super().__init__(reads, embedding)
        self.layers_per_block = layers_per_block
        self.partial: list[Tensor] = []
        """The running sum, or nothing where no layer of the depth block has written yet."""

    def read(self) -> Tensor:
        mix, _ = self.reads[0]([*self.sources, *self.partial], torch.stack(self.logits[0]))
        return mix

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        self._advance()
        # Kept in the embedding's dtype, as the ordinary stream is, whatever autocast makes of outputs.
        grown = self.partial.pop() + output if self.partial else output.to(self.sources[0].dtype)
        written = len(self.queries) - len(self.reads)
        if written % self.layers_per_block == 0:
            self.commit(grown)
        else:
            self.partial.append(grown)
            # It will have grown by the read after next, so it gets a logit for the next read only.
            self._score(grown, 1)
