"""Taps of a model whose depth reads were found: its embedding, and what its reads are computed again from."""

from collections.abc import Callable

import torch
from torch import Tensor

from probes.found import FoundReads
from probes.read_taps import ReadTaps
from probes.statistics import DEPTH_METRICS


class FoundTaps:
    """Hangs on the `taps` of a model (taps.py) what its found reads need; `forget` ends a forward."""

    def __init__(self, found: FoundReads, states: dict[int, int], taps):
        """`states` are the rows of states that nothing but a read shows, by row of that."""
        self._taps, self._states = taps, states
        self._embedding, self._turned = found.embedding, found.turned
        self._are_sources = [read.is_source for read in found.reads]
        self._reads = ReadTaps(found, self._computed)
        self._parts: dict[int, Tensor] = {}  # of the embedding, in this forward

    def attach(self) -> None:
        taps = self._taps
        if len(self._embedding) == 1:
            taps.at(self._embedding[0], lambda x: taps.tap_embedding(x, turned=self._turned))
        for part, place in enumerate(self._embedding if len(self._embedding) > 1 else ()):
            taps.at(place, lambda x, part=part: self._part(x, part))
        for module, before, met in self._reads.places():
            if before:
                taps.before(module, lambda args, kwargs, met=met: self._meet(met, (args, kwargs)))
            else:
                taps.after(module, lambda args, kwargs, output, met=met: self._meet(met, output))

    def forget(self) -> None:
        self._reads.forget()
        self._parts.clear()

    def _meet(self, met: Callable, values: object) -> None:
        if self._taps.matrices and not self._taps.recomputing:
            if torch.compiler.is_compiling():
                met(values)
            else:
                self._taps.eagerly(lambda: met(values), *DEPTH_METRICS, "read_error")

    def _computed(
        self,
        row: int,
        weights: Tensor,
        sources: list[Tensor],
        state: Tensor | None,
        mix: Tensor | None,
        error: Tensor,
        allowed: float,
    ) -> None:
        if mix is not None and row in self._states:
            self._taps.values(mix, "state", self._states[row], error <= allowed)
        self._taps.depths.add(row, weights, sources)
        self._taps.read_errors.add(row, error, allowed)
        if not self._are_sources[row]:  # the gradient of a source carries every later read
            self._taps.edge_taps.read(row, state, weights, sources)

    def _part(self, x: Tensor, part: int) -> None:
        """One of several tensors that are summed to the embedding where no hook sees it. What has its full shape has
        its gradient too."""
        taps = self._taps
        if taps.recomputing or not isinstance(x, Tensor):
            return
        self._parts[part] = x
        if len(self._parts) == len(self._embedding):
            parts = [self._parts[each] for each in sorted(self._parts)]
            self._parts.clear()
            embedding = sum(each.detach() for each in parts)
            taps.values(embedding.transpose(0, 1) if self._turned else embedding, "output", 0)
            whole = next((each for each in parts if each.shape == embedding.shape), None)
            if whole is not None:
                taps.gradient(whole, "output", 0)
