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

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnres.checks import check_count, check_output, check_sources
from attnres.depth_attention import DepthAttention
from attnres.linked import Link, scored
from attnres.schedules import FusedStream, StackStream, TwoPhaseStream, chosen
from attnres.stream import Stream


class PreNorm(nn.Module):
    """The ordinary residual stream: a running sum (Eq. 1). No parameters."""

    def open(self, embedding: Tensor) -> "PreNormStream":
        """The stream of one pass, from the embedding [B, T, D]."""
        return PreNormStream(embedding)


class PreNormStream(Stream):
    """The running sum of all sources."""

    def __init__(self, embedding: Tensor):
        self.newest = [embedding]

    def read(self) -> Tensor:
        return self.newest[0]

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        self.newest[0] = self.newest[0] + output


class AttnRes(nn.Module):
    """What Full and Block have in common: a read for every layer, and one for the final state."""

    layers_per_block: int
    """1 is Full."""

    def __init__(self, width: int, depth_sources: Sequence[int], eps: float):
        super().__init__()
        self.reads = nn.ModuleList(DepthAttention(width, count, eps) for count in depth_sources)
        self.schedule = "auto"
        """The order of the arithmetic; see schedules.py."""
        self.recompute = False
        """Whether backward computes each mix again instead of keeping it (with "auto" and "no_stack" only)."""

    def queries(self) -> Tensor:
        """The effective queries of all R reads, [R, D]."""
        return torch.stack([read.effective_query() for read in self.reads])

    def open(self, embedding: Tensor, queries: Tensor | None = None) -> Stream:
        """The stream of one pass, from the embedding [B, T, D]; ValueError for an unknown schedule.

        `queries` are those of `queries()`, where many passes with the same parameters work them out once.
        """
        check_sources("embedding", [embedding], len(self.reads[0].query))
        schedule = chosen(self, embedding)
        if schedule == "no_stack":
            return self._no_stack(embedding, self.queries() if queries is None else queries)
        stream = {"stack": StackStream, "two_phase": TwoPhaseStream, "fused": FusedStream}[schedule]
        return stream(self.reads, embedding, self.layers_per_block)


class Full(AttnRes):
    """Full AttnRes (Eq. 2-4): every read attends over the embedding and all outputs so far."""

    layers_per_block = 1

    def __init__(self, width: int, layers: int, eps: float = 1e-6):
        check_count("layers", layers)
        super().__init__(width, range(1, layers + 2), eps)

    def _no_stack(self, embedding: Tensor, queries: Tensor) -> Stream:
        return FullStream(self.reads, queries, embedding, self.recompute)


class Block(AttnRes):
    """Block AttnRes (Eq. 5-6): depth blocks of `layers_per_block` layers, the last one possibly ragged."""

    def __init__(self, width: int, layers: int, layers_per_block: int, eps: float = 1e-6):
        check_count("layers", layers)
        check_count("layers_per_block", layers_per_block)
        counts = [block_sources(row, layers_per_block) for row in range(layers + 1)]
        super().__init__(width, counts, eps)
        self.layers_per_block = layers_per_block

    def _no_stack(self, embedding: Tensor, queries: Tensor) -> Stream:
        return BlockStream(self.reads, queries, embedding, self.layers_per_block, self.recompute)


def block_sources(written: int, layers_per_block: int) -> int:
    """How many sources a read has after `written` layers: the embedding, and every depth block begun by then."""
    return 1 + -(-written // layers_per_block)


class FullStream(Stream):
    """All sources so far, each with its logits for the reads still to come."""

    def __init__(self, reads: nn.ModuleList, queries: Tensor, embedding: Tensor, recompute: bool = False):
        self.recompute = recompute
        self.queries = queries
        self.reads = list(reads)
        """Those still to come, the next one first."""
        self.sources: list[Tensor] = []
        # One list per read still to come: the logits of its sources, oldest first, [B, T] each, or the links to them.
        self.logits: list[list[Tensor | Link]] = [[] for _ in reads]
        self.commit(embedding)

    def commit(self, source: Tensor) -> None:
        """Show a finished source to every read from the next one on."""
        self.sources.append(source)
        self._score(source, len(self.reads))

    def _score(self, source: Tensor, count: int) -> None:
        """Give the next `count` reads their logits of the source."""
        row = self.written
        queries = self.queries[row : row + count]
        scores = scored(source, queries, self.reads[0].eps, self.sources[0].dtype)
        for logits, score in zip(self.logits[:count], scores, strict=True):
            logits.append(score)

    @property
    def written(self) -> int:
        """How many layers have written."""
        return len(self.queries) - len(self.reads)

    def _advance(self) -> None:
        """The next layer has been read for."""
        self.reads.pop(0)
        self.logits.pop(0)

    def visible(self) -> list[Tensor]:
        """The sources of the next read, oldest first: a list of its own, as ours grow and hooks may keep it."""
        return [*self.sources]

    def read(self) -> Tensor:
        mix, _ = self.reads[0](self.visible(), self.logits[0])
        return mix

    def read_through(self, norm: nn.Module) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            return norm(self.read())
        read, logits, sources = self.reads[0], self.logits[0], self.visible()
        # Not as arguments, which would be other tensors the second time than those that are linked.
        return checkpoint(
            lambda: norm(read(sources, logits)[0]), use_reentrant=False, preserve_rng_state=False
        )

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        check_output(1 + self.written, len(self.queries) - 1, output, self.sources[0])
        self._advance()
        self.commit(output)


class BlockStream(FullStream):
    """The embedding, finished depth blocks, and the running partial sum of the unfinished one."""

    def __init__(
        self,
        reads: nn.ModuleList,
        queries: Tensor,
        embedding: Tensor,
        layers_per_block: int,
        recompute: bool = False,
    ):
        super().__init__(reads, queries, embedding, recompute)
        self.layers_per_block = layers_per_block
        self.partial: list[Tensor] = []
        """The running sum, or nothing where no layer of the depth block has written yet."""

    def visible(self) -> list[Tensor]:
        return [*self.sources, *self.partial]

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        check_output(1 + self.written, len(self.queries) - 1, output, self.sources[0])
        self._advance()
        # Kept in the embedding's dtype, as the ordinary stream is, whatever autocast makes of outputs.
        grown = self.partial.pop() + output if self.partial else output.to(self.sources[0].dtype)
        if self.written % self.layers_per_block == 0:
            self.commit(grown)
        else:
            self.partial.append(grown)
            # It will have grown by the read after next, so it gets a logit for the next read only.
            self._score(grown, 1)
