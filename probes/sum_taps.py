"""Taps of states and outputs that are sums and differences of those that hooks see: what nobody receives is the state
before it and what was added, and what nobody returns is what the stream has gained."""

from torch import Tensor

from probes.rows import rows_by_arithmetic
from probes.sites import Sites


class SumTaps:
    """Told of each state and output that the `taps` of a model (taps.py) meet, and tells these of the others; `forget` ends
    a forward. Rows count layers from 0, the final state last."""

    def __init__(self, sites: Sites, taps):
        self._taps = taps
        self._summed_rows, self._kept_rows = rows_by_arithmetic(sites)
        self._states: dict[int, Tensor] = {}  # of this forward, by row

    def forget(self) -> None:
        self._states.clear()

    def state(self, x: object, row: int) -> None:
        """Keep a state [B, T, D] that others are sums or differences of."""
        if row in self._kept_rows and isinstance(x, Tensor) and not self._taps.recomputing:
            self._states[row] = x.detach()

    def output(self, x: Tensor, row: int) -> None:
        """Sum the next state, where no module receives it. It is the output's only way on, so that the two have one
        gradient."""
        if row + 1 not in self._summed_rows:
            return
        self._taps.gradient(x, "state", row + 1)
        if row in self._states:
            state = self._states.pop(row) + x.detach()
            self._taps.values(state, "state", row + 1)
            if row + 1 in self._kept_rows:
                self._states[row + 1] = state

    def after(self, x: object, row: int) -> None:
        """The stream after a layer: less its state, that is what the layer has added. It has the stream's gradient."""
        if isinstance(x, Tensor):
            self._taps.gradient(x, "output", row + 1)
            if row in self._states:
                self._taps.values(x.detach() - self._states.pop(row).view_as(x), "output", row + 1)
