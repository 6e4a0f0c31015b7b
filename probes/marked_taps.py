"""Tensors that an author names in the model's own forward (marks.py), in rows that no hook sees."""

from torch import Tensor

from probes import marks
from probes.rows import unhooked_rows
from probes.sites import Sites


class MarkedTaps:
    """Hands marks to the `taps` of a model (taps.py) from `listen` to `close`."""

    def __init__(self, sites: Sites, taps):
        self._taps = taps
        self._unhooked = unhooked_rows(sites)
        self._outputs: dict[int, Tensor] = {}  # of this forward, by row, for the reads to come

    def listen(self) -> None:
        marks.listen(self)

    def close(self) -> None:
        marks.forget(self)

    def forget(self) -> None:
        """A forward has ended."""
        self._outputs.clear()

    def marked(self, x: Tensor, place: str, row: int) -> None:
        """A tensor that the author has named; only for rows that no hook sees."""
        taps = self._taps
        if row in self._unhooked[place] and taps.wants():
            taps.timed(self._read if place == "read" else taps.tap, x, place, row)
            if place == "output" and taps.matrices and isinstance(x, Tensor):
                self._outputs[row] = x.detach()

    def _read(self, weights: Tensor, place: str, row: int) -> None:
        """Weights [S, B, T] of the embedding and the outputs before; their contributions are known where those have
        been marked."""
        if not self._taps.matrices or self._taps.recomputing:
            return
        if weights.ndim != 3 or len(weights) != row + 1:
            raise ValueError(
                f"mark(weights, read={row + 1}) wants the weights [{row + 1}, B, T] of the embedding and the layers "
                f"before, not {list(weights.shape)}"
            )
        self._taps.depths.add(row, weights, [self._outputs.get(source) for source in range(row + 1)])
