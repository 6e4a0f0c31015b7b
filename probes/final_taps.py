"""The final state of a followed stack: what the final norm is given after the blocks, where that has the stream's shape;
else what the last block returns, unless the graph of a forward shows that other states are mixed into it on its way.

Both are summed up, each in a row of its own, and the sums say which it is (tally.py): compiled code can hand nothing on
from a checkpointed block to a norm behind it.
"""

import torch
from torch import Tensor

from probes.graph import mixed_on_its_way
from probes.sites import Place, Sites


class FinalTaps:
    """Told of the forwards that the `taps` of a model (taps.py) look at; they tap the final state where this finds it.
    `reason` says why it is blank, empty while it is not."""

    def __init__(self, sites: Sites, taps):
        self._sites, self._taps, self._row = sites, taps, len(sites.layers)
        self.reason = ""
        # An eager model without a norm that is given the stream is looked at once.
        self._open = sites.final is not None and not (sites.final.is_input or sites.staged or sites.has_reads)
        self._given = False  # the norm was given the stream, in any forward
        self._left: Tensor | None = None  # what the last block returned in this forward
        self._met: set = set()  # graph nodes of this forward's states and outputs

    @property
    def place(self) -> Place | None:
        """Where the final state is seen, as far as is known."""
        return self._sites.receiver if self._given else self._sites.final

    def attach(self) -> None:
        if self._sites.final is not None:
            self._taps.at(self._sites.final, self._leaves)
        if self._sites.receiver is not None:
            self._taps.at(self._sites.receiver, self._receives)

    def met(self, x: Tensor) -> None:
        """A state or output was tapped."""
        if self._open and not torch.compiler.is_compiling() and x.grad_fn is not None:
            self._met.add(x.grad_fn)

    def end(self, output: object) -> None:
        """The forward returned."""
        left = self._left
        if not self._open or self._given or left is None or left.grad_fn is None:
            return
        self._open = False
        if mixed_on_its_way(left, self._met, output):
            self._taps.tally.lost_final = True
            self.reason = (
                "other states are mixed into what the last transformer block returns, and no norm that is a module is "
                "given the result"
            )

    def forget(self) -> None:
        if not torch.compiler.is_compiling():
            self._left = None
            self._met.clear()

    def _leaves(self, x: object) -> None:
        taps = self._taps
        if not isinstance(x, Tensor):
            return
        taps.tap(x, "state", self._row)
        if taps.matrices:
            taps.edge_taps.final(x)
        if not torch.compiler.is_compiling() and not taps.recomputing:
            self._left = x

    def _receives(self, x: object) -> None:
        taps, row = self._taps, self._row
        if not isinstance(x, Tensor):
            return
        if torch.compiler.is_compiling() or self._left is None:
            # After the blocks, as far as counts tell: more has left them than the norm was given so far.
            if x.ndim > 2:
                left, given = taps.state_counts[row], taps.state_counts[row + 1]
                taps.tap(x, "state", row + 1, known=left > given)
        elif x.shape == self._left.shape:
            self._given = True
            as_it_left = x is self._left or (x.grad_fn is not None and x.grad_fn is self._left.grad_fn)
            # A norm may be given earlier states too, for what they would predict.
            if not as_it_left and x.grad_fn not in self._met:
                taps.tap(x, "state", row + 1)
