"""The finished sources of one forward pass of a converted model, and how a read mixes them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from attnres.fused import fused_read
from attnres.linked import scored
from attnres.weights import NAME


class Depth(Protocol):
    """The finished sources of one forward pass."""

    records: bool
    """Whether gradients were on when the pass began."""

    def commit(self, sources: Sequence[Tensor], written: int) -> "Depth":
        """The same with more sources, finished after `written` layers."""

    def read(self, row: int, running: Sequence[Tensor]) -> Tensor:
        """The state of read `row` (from 0) over the finished sources and those of the block that is running."""


class AttentiveDepth:
    """Sources, and the logits of each for all reads after it."""

    def __init__(
        self,
        reads: nn.ModuleList,
        queries: Tensor,
        records: bool,
        sources: tuple = (),
        logits: tuple = (),
    ):
        self.reads, self.queries, self.records, self.sources = reads, queries, records, sources
        self.logits = logits
        """A pair for each source: the first row that it has logits for, and the logits, or links, from there on. No pairs at all
        where a fused kernel reads."""

    @classmethod
    def open(cls, model: nn.Module) -> "AttentiveDepth":
        """That of a pass of a converted model, whose reads may be others than the last time: PEFT trains a copy of them."""
        residual = getattr(model, NAME)
        return cls(residual.reads, residual.queries(), torch.is_grad_enabled())

    def commit(self, sources: Sequence[Tensor], written: int) -> "AttentiveDepth":
        logits = self.logits
        if fused_read(sources, self.reads[-1].depth_sources) is None:
            eps = self.reads[0].eps
            mixed = (self.sources or sources)[0].dtype
            new = [(written, scored(source, self.queries[written:], eps, mixed)) for source in sources]
            logits = (*logits, *new)
        return AttentiveDepth(self.reads, self.queries, self.records, (*self.sources, *sources), logits)

    def read(self, row: int, running: Sequence[Tensor]) -> Tensor:
        if len(self.logits) < len(self.sources):
            return self.reads[row]([*self.sources, *running])[0]
        logits = [rest[row - start] for start, rest in self.logits]
        query = self.queries[row : row + 1]
        eps, mixed = self.reads[row].eps, self.sources[0].dtype
        logits += [scored(source, query, eps, mixed)[0] for source in running]
        mix, _ = self.reads[row]([*self.sources, *running], logits)
        return mix
