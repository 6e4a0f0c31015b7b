"""Depth weights of reads, and the size of what each read takes of its sources."""

import torch
from torch import Tensor

from probes.masks import fitting
from probes.sites import Sites
from probes.statistics import DEPTH_METRICS, DepthSums, token_mean_square


class DepthTaps:
    """Hangs on the `taps` of a model (taps.py) what the reads of depthscope's own protocol show; others tell it of theirs.
    `sums` are those of the step; `forget` ends a forward."""

    def __init__(self, sites: Sites, taps):
        self._sites, self._taps = sites, taps
        self.sums: DepthSums | None = None
        self._mean_squares: dict[int, tuple[Tensor, Tensor]] = {}

    def attach(self) -> None:
        for row, read in enumerate(self._sites.reads):
            self._taps.after(read, lambda args, kwargs, output, row=row: self._read(row, args[0], *output))

    def forget(self) -> None:
        self._mean_squares.clear()

    def _read(self, row: int, sources: list[Tensor], mix: Tensor, weight: Tensor) -> None:
        taps = self._taps
        if not taps.matrices:
            return
        taps.edge_taps.read(row, mix, weight, sources)
        if taps.recomputing:
            return
        if torch.compiler.is_compiling():
            self.add(row, weight, sources)
        else:
            taps.eagerly(lambda: self.add(row, weight, sources), *DEPTH_METRICS)

    def add(self, row: int, weight: Tensor, sources: list[Tensor | None]) -> None:
        """The weights [S, B, T] of a read of S sources [B, T, D]; None is one that nobody has seen."""
        squares = [
            torch.full_like(weight[0], torch.nan, dtype=torch.float32)
            if source is None
            else self._mean_square(source)
            for source in sources
        ]
        self.sums.add(row, weight, squares, fitting(self._taps.mask, weight.movedim(0, -1)))

    def _mean_square(self, source: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler removes the repeated computation by itself
            return token_mean_square(source)
        # A source is read many times in one forward; keeping the tensor beside its result keeps its id from
        # reuse.
        if id(source) not in self._mean_squares:
            self._mean_squares[id(source)] = source, token_mean_square(source)
        return self._mean_squares[id(source)][1]
