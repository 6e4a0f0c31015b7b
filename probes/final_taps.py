"""The final state of a followed stack: what the final norm is given where that has the stream's shape.

What the last block returns may still be mixed, scaled or pooled on its way there. Where the norm is given a pool of it, or
the model has no norm as a module, it is the final state as long as the graph shows that it goes on alone.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch._dynamo import OptimizedModule

from probes.parallel import local
from probes.sites import Sites

_MOST = 20_000  # nodes of a graph that are looked at


class FinalTaps:
    """Told of the forwards that the `taps` of a model (taps.py) look at; they tap the final state where this finds it.
    `reason` says why it is blank, empty while it is not."""

    def __init__(self, sites: Sites, taps):
        self._sites, self._taps, self._row = sites, taps, len(sites.layers)
        self.reason = ""
        self._eager = True
        self._left: Tensor | None = None  # what the last block returned in this forward
        self._settled = False
        self._alone: bool | None = None  # whether what it returned goes on alone, once that was looked at
        self._marks: set = set()  # graph nodes of the states and outputs of this forward

    def attach(self) -> None:
        sites, taps = self._sites, self._taps
        if sites.final is None:
            return
        if sites.final.is_input or sites.staged or sites.has_reads:
            taps.at(sites.final, lambda x: taps.final(x, self._row))
            return
        taps.at(sites.final, self._leaves)
        if sites.receiver is not None:
            taps.at(sites.receiver, self._received)

    def begin(self, compiling: bool) -> None:
        # Between compiled and eager code nothing is handed on.
        self._eager = not compiling and not any(map(_compiled, self._sites.root.modules()))

    def met(self, x: Tensor) -> None:
        """A state or output was tapped."""
        if (
            self._eager
            and not torch.compiler.is_compiling()
            and self._alone is None
            and x.grad_fn is not None
        ):
            self._marks.add(x.grad_fn)

    def end(self, output: object) -> None:
        """The forward returned: what no norm was given may be seen to go into that."""
        if self._left is None or self._settled or not self._eager or torch.compiler.is_compiling():
            return
        given = [x.grad_fn for x in _tensors(output) if x.grad_fn is not None]
        target = self._left.grad_fn
        # States that are handed out beside it mix nothing.
        self._pass_on([each for each in given if each is target or each not in self._marks])

    def forget(self) -> None:
        self._left = None
        self._settled = False
        self._marks.clear()

    def _leaves(self, x: Tensor) -> None:
        taps = self._taps
        if not self._eager:
            if not self._sites.receiver_later:
                taps.final(x, self._row)
        elif taps.recomputing:  # nothing is kept then
            if self._alone:
                taps.tap(x, "state", self._row)
        elif isinstance(x, Tensor):
            self._left, self._settled = x, False
            if taps.matrices:
                taps.edge_taps.final(x)

    def _received(self, x: Tensor) -> None:
        taps = self._taps
        if not isinstance(x, Tensor):
            return
        if not self._eager:
            if self._sites.receiver_later and x.ndim > 2:
                taps.tap(x, "state", self._row)
        elif taps.recomputing:
            if self._alone is None:
                taps.tap(x, "state", self._row)
        elif self._left is not None and not self._settled:
            if x.shape == self._left.shape:
                self._settled = True
                taps.tap(x, "state", self._row)
                if local(x).data_ptr() != local(self._left).data_ptr():
                    taps.tally.apart = True
            else:
                self._pass_on([x.grad_fn])

    def _pass_on(self, given: list) -> None:
        """The last block's output is the final state if it alone is what `given` graph nodes were made of."""
        self._settled = True
        if self._alone is None:
            self._alone = _made_alone(given, self._left.grad_fn, self._marks)
        if self._alone:
            self._taps.tap(self._left, "state", self._row)
        else:
            self.reason = "it was not seen that what the last transformer block returns goes unchanged to the final norm or head"


def _made_alone(given: list, target: object, others: set) -> bool:
    """Whether `given` graph nodes come from `target` and, but for what that was made of, from none of the `others`."""
    waiting, done, met = [each for each in given if each is not None], set(), False
    while waiting:
        each = waiting.pop()
        if each is target:
            met = True
        elif each in others or len(done) > _MOST:
            return False
        elif each not in done:
            done.add(each)
            waiting += [before for before, _ in each.next_functions if before is not None]
    return met


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _tensors(each)
    elif hasattr(tree, "__dataclass_fields__"):
        for each in vars(tree).values():
            yield from _tensors(each)


def _compiled(module: object) -> bool:
    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
