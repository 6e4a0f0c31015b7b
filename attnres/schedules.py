"""Other orders of the same arithmetic than the one in `residual.py`.

    no_stack   a source meets all of its later queries when it is written; the mix is an unstacked sum; in eager
               training a source gets its gradient from all its reads at once (linked.py)
    stack      every read stacks its sources, normalises them and mixes them, as in the paper's pseudocode
    two_phase  all queries of a depth block meet its finished sources at once, and each read merges its partial sum
               into that by online softmax (the paper's §4)
    fused      every read is another package's kernel (fused.py)
    auto       fused where there is one; otherwise no_stack, the fastest of the others

`benchmarks/attnres.py` prints their times; all of them are tested against the definition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnres.checks import check_output
from attnres.fused import fused_read
from attnres.logits import source_logits
from attnres.stream import Stream

SCHEDULES = ("no_stack", "stack", "two_phase")
"""Those that every machine has."""


def chosen(residual: nn.Module, embedding: Tensor) -> str:
    """The schedule for one pass, "auto" decided; ValueError for one that is unknown or cannot be here."""
    schedule = residual.schedule
    if schedule not in ("auto", "fused", *SCHEDULES):
        raise ValueError(f"schedule must be one of auto, {', '.join(SCHEDULES)}, fused, not {schedule!r}.")
    if schedule in SCHEDULES:
        return schedule
    has_kernel = fused_read([embedding], residual.reads[-1].depth_sources) is not None
    if schedule == "fused" and not has_kernel:
        raise ValueError(
            'schedule "fused" needs tensors on CUDA, of at most 32 bits, in a model that is not compiled, and '
            "flash-linear-attention installed, or liger-kernel for up to 32 sources."
        )
    # Only no_stack computes its mixes again in backward.
    return "fused" if has_kernel and not (schedule == "auto" and residual.recompute) else "no_stack"


class _Sums(Stream):
    """The embedding, finished depth blocks, and the running partial sum, without any logits."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor, layers_per_block: int):
        self.reads = list(reads)
        self.layers = len(reads) - 1
        self.layers_per_block = layers_per_block
        self.sources = [embedding]
        self.partial: list[Tensor] = []

    def write(self, output: Tensor, given: Tensor | None = None) -> None:
        check_output(self.layers + 2 - len(self.reads), self.layers, output, self.sources[0])
        self.reads.pop(0)
        written = self.layers + 1 - len(self.reads)
        grown = self.partial.pop() + output if self.partial else output.to(self.sources[0].dtype)
        (self.sources if written % self.layers_per_block == 0 else self.partial).append(grown)


class FusedStream(_Sums):
    """Every read on its own, by a fused kernel where it takes the sources."""

    def read(self) -> Tensor:
        return self.reads[0]([*self.sources, *self.partial])[0]


class StackStream(_Sums):
    """One stack for every read."""

    def read(self) -> Tensor:
        read = self.reads[0]
        query, eps = read.effective_query(), read.eps

        def mix(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            values = torch.stack(list(sources))
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            keys = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            weight = torch.softmax(keys @ query.to(wide.dtype), dim=0)
            return (weight.to(values.dtype).unsqueeze(-1) * values).sum(0), weight

        return read([*self.sources, *self.partial], mix=mix)[0]


class TwoPhaseStream(_Sums):
    """Finished sources once for all reads of a depth block, partial sums one by one."""

    def __init__(self, reads: nn.ModuleList, embedding: Tensor, layers_per_block: int):
        super().__init__(reads, embedding, layers_per_block)
        self.finished: list[_Finished] = []

    def read(self) -> Tensor:
        if not self.partial:
            self.finished[:] = [_Finished(self.reads[: self.layers_per_block], self.sources)]
        read, finished = self.reads[0], self.finished[0]
        sources = [*self.sources, *self.partial]
        return read(sources, mix=lambda given: finished.merged(read, given[len(self.sources) :]))[0]


class _Finished:
    """What R reads make of S finished sources: un-normalised mixes, the largest logits and the sums of exponentials."""

    def __init__(self, reads: Sequence[nn.Module], sources: Sequence[Tensor]):
        self.rows = list(reads)
        queries = torch.stack([read.effective_query() for read in reads])
        logits = torch.stack([torch.stack(source_logits(x, queries, reads[0].eps)) for x in sources], dim=1)
        largest = logits.detach().amax(1)
        shares = (logits - largest.unsqueeze(1)).exp()
        mixes = torch.einsum("rsbt,sbtd->rbtd", shares.to(sources[0].dtype), torch.stack(list(sources)))
        self.largest, self.shares, self.mixes = largest.unbind(0), shares.unbind(0), mixes.unbind(0)

    def merged(self, read: nn.Module, running: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The mix [B, T, D] and the weights of one of the reads, with the partial sum where there is one."""
        row = next(index for index, each in enumerate(self.rows) if each is read)
        largest, shares, mix = self.largest[row], self.shares[row], self.mixes[row]
        if not running:
            total = shares.sum(0)
            return mix / total.to(mix.dtype).unsqueeze(-1), shares / total
        (partial,) = running
        (logit,) = source_logits(partial, read.effective_query().unsqueeze(0), read.eps)
        # The shift cancels, so no gradient has to go through it.
        top = torch.maximum(largest, logit.detach())
        scale, share = (largest - top).exp(), (logit - top).exp()
        total = scale * shares.sum(0) + share
        old, new = ((x / total).to(mix.dtype).unsqueeze(-1) for x in (scale, share))
        return old * mix + new * partial, torch.cat((scale * shares, share.unsqueeze(0))) / total
