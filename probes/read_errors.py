"""Whether the weights found for each read give back its state; where they do not, they are left out."""

import torch
from torch import Tensor

from probes.edges import EDGE_METRICS
from probes.statistics import DEPTH_METRICS


class ReadErrors:
    """The largest error of each read in a step, [R], and how large it may be. `sources` are those of each read."""

    def __init__(self, sources: list[int], device: torch.device):
        self._errors = torch.zeros(len(sources), device=device)
        self._allowed = torch.zeros(len(sources), device=device)
        rows = torch.arange(len(sources)).repeat_interleave(torch.tensor(sources))
        self._row_of_cell = rows.to(device)

    def tensors(self) -> list[Tensor]:
        return [self._errors, self._allowed]

    def reset(self) -> None:
        self._errors.zero_()

    def add(self, row: int, error: Tensor, allowed: float) -> None:
        self._errors[row].copy_(torch.maximum(self._errors[row], error.float()))
        self._allowed[row].fill_(allowed)

    def blanked(self, metrics: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """`metrics` and `read_error`, with nothing of a read that is not explained by its weights; `seen` [R] tells
        which were computed."""
        wrong = ~(self._errors <= self._allowed)
        found = {"read_error": self._errors.where(seen > 0, torch.nan)}
        for name, values in metrics.items():
            if name in (*DEPTH_METRICS, *EDGE_METRICS):
                rows = wrong if len(values) == len(wrong) and "entropy" in name else wrong[self._row_of_cell]
                values = values.masked_fill(rows, torch.nan)
            found[name] = values
        return found
