"""Live attribution: the sources of each read, kept at a sample of tokens until the gradient of the mix comes.

In a baseline the mix of a layer is its branch: what its norm receives, as far as it goes through that norm.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from probes.edges import EDGE_METRICS, add_edges, few, taken
from probes.hooks import tap_edges_in_graph
from probes.masks import fitting
from probes.norms import Norm, understood
from probes.parallel import local
from probes.rows import edge_sources
from probes.sites import Place, Sites

_STEP = 0.7548776662466927  # multiples of it, without their whole parts, are spread evenly


class _Forward:
    """The tokens that are looked at in one forward, and what is kept of them until `clear`."""

    def __init__(self, offset: Tensor):
        self._offset = offset
        self._total: int | None = None
        self._tokens: Tensor | None = None
        self._once: dict[int, tuple[Tensor, Tensor]] = {}  # by id, while the tensor is held beside it
        self.outputs: dict[int, Tensor] = {}  # by row
        self.final: tuple | None = None
        # By place and row, what is to meet the gradient; None where that is several things.
        self.reads: dict[tuple[str, int], tuple | None] = {}

    def take(self, x: Tensor) -> Tensor | None:
        """The tokens of `x` [..., D], [N, D]; None where it has not as many as others of this forward."""
        x = local(x)
        total = x.numel() // max(x.shape[-1], 1)
        if self._total is None:
            self._total, self._tokens = total, few(x, self._offset)
        return taken(x, self._tokens) if total == self._total else None

    def take_once(self, x: Tensor) -> Tensor | None:
        """The same; a source is read many times in one forward."""
        if id(x) not in self._once:
            self._once[id(x)] = x, self.take(x)
        return self._once[id(x)][1]

    def keep(self, key: tuple[str, int], *parts) -> None:
        self.reads[key] = None if key in self.reads else parts

    def of_tokens(self, x: Tensor) -> Tensor:
        """[..., B*T] -> [..., N]"""
        return x.detach() if self._tokens is None else x.detach()[..., self._tokens]

    @property
    def scale(self) -> float:
        """How many tokens each of them stands for."""
        return 1.0 if self._tokens is None else self._total / len(self._tokens)

    def end(self) -> None:
        self._once.clear()

    def clear(self) -> None:
        self.end()
        self.outputs.clear()
        self.reads.clear()


class EdgeTaps:
    """Hangs on the `taps` of a model (taps.py) what its depth edges need, where matrices are wanted.

    `unknown` are the labels of reads that stay blank, for nothing is known of the norm that feeds them.
    """

    def __init__(self, sites: Sites, taps):
        self._taps = taps
        self._branches = dict(_branches(sites))
        self._given = edge_sources(sites)
        self.unknown = (
            [read.label for row, read in enumerate(sites.layout.reads) if row not in self._branches]
            if self._given and not sites.has_reads
            else []
        )
        # Of this model's forwards that are still to be differentiated: their tensors must not outlive the step.
        self._forwards: weakref.WeakSet[_Forward] = weakref.WeakSet()
        # No scalar, which the compiler would take for one that it has to specialise on.
        self._offset = torch.zeros(1)

    def attach(self) -> None:
        for row, norm in self._branches.items():
            self._taps.after(
                norm.module,
                lambda args, kwargs, output, row=row: self._branch(row, (*args, *kwargs.values()), output),
            )

    def follow(self, device: torch.device) -> None:
        """The model is on that device now."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._offset = torch.zeros(1, device=device, dtype=wide)

    def begin(self) -> None:
        """An eager forward begins, at which matrices are wanted."""
        self._offset = (self._offset + _STEP).frac()
        forward = _Forward(self._offset)
        self._forwards.add(forward)
        self._taps.passes.now.edges = forward

    def end(self) -> None:
        """The forward has ended."""
        if torch.compiler.is_compiling():
            return
        for forward in self._forwards:
            forward.end()

    def reset(self) -> None:
        """The step is over: let go of all that was kept."""
        for forward in self._forwards:
            forward.clear()
        self._forwards.clear()

    def output(self, x: Tensor, row: int) -> None:
        """Source `row` of a baseline, where matrices are wanted."""
        if self._branches and not torch.compiler.is_compiling():
            self._taps.eagerly(lambda: self._keep(x, row), *EDGE_METRICS)

    def _keep(self, x: Tensor, row: int) -> None:
        forward = self._taps.passes.now.edges
        part = forward.take(x)
        if part is not None:
            forward.outputs[row] = part

    def read(self, row: int, mix: object, weight: Tensor, sources: list[Tensor]) -> None:
        """Sources S times [B, T, D] were mixed with `weight` [S, B, T]."""
        if not isinstance(mix, Tensor):
            return
        if torch.compiler.is_compiling():
            mask = fitting(self._taps.mask, mix)
            if mix.requires_grad:
                tap_edges_in_graph(mix, self._taps.edges[row], mask, self._offset, weight, *sources)
        elif self._due("read", row):
            self._taps.eagerly(lambda: self._watch_read(row, mix, weight, sources), *EDGE_METRICS)

    def _watch_read(self, row: int, mix: Tensor, weight: Tensor, sources: list[Tensor]) -> None:
        forward = self._taps.passes.now.edges
        if not self._taps.recomputing:
            parts = [forward.take_once(source) for source in sources]
            if any(part is None for part in parts):
                return
            forward.keep(("read", row), parts, forward.of_tokens(weight.flatten(1)))
        self._watch(mix, "read", row)

    def final(self, x: object) -> None:
        """The final state of a baseline, where matrices are wanted."""
        forward = None if torch.compiler.is_compiling() else self._taps.passes.now.edges
        if isinstance(x, Tensor) and forward is not None:
            forward.final = _memory(x)

    def _branch(self, row: int, given: tuple, y: object) -> None:
        """The norm of layer row+1, or the final one, made `y` of the state it was given."""
        # Outputs cannot be handed on from where a compiler looks: inside a checkpoint it refuses to trace that.
        if torch.compiler.is_compiling() or not given or not self._due("branch", row):
            return
        if isinstance(given[0], Tensor) and isinstance(y, Tensor):
            self._taps.eagerly(lambda: self._watch_branch(row, given[0], y), *EDGE_METRICS)

    def _watch_branch(self, row: int, x: Tensor, y: Tensor) -> None:
        forward = self._taps.passes.now.edges
        if not self._taps.recomputing:
            if row == len(self._given) - 1 and forward.final != _memory(x):
                return  # what this norm is given is not the final state
            state = forward.take(x)
            parts = [forward.outputs.get(source) for source in range(self._given[row])]
            if state is None or any(part is None for part in parts):
                return
            forward.keep(("branch", row), parts, None, state)
        self._watch(y, "branch", row)

    def _due(self, place: str, row: int) -> bool:
        taps = self._taps
        return taps.matrices and (not taps.recomputing or taps.gradients.owes(place, row))

    def _watch(self, x: Tensor, place: str, row: int) -> None:
        """Add a read to its row when the gradient of `x` comes, its mix or what a norm made of that."""
        taps = self._taps
        forward = taps.passes.now.edges
        if forward.reads.get((place, row)) is None:
            return
        sums, mask = taps.edges[row], fitting(taps.passes.now.mask, x)
        mask = None if mask is None else forward.of_tokens(mask.flatten())

        def add(gradient: Tensor) -> None:
            kept = forward.reads.get((place, row))
            if kept is None:
                return  # the step it belongs to is over, or the read was made twice
            parts, weight, *state = kept
            gradient = forward.take(gradient)
            if state:
                gradient = self._branches[row].backward(*state, gradient)
            add_edges(sums, gradient, parts, weight, mask, forward.scale)

        taps.gradients.watch(x, taps.passes, (place, row), EDGE_METRICS, add)


def _branches(sites: Sites) -> Iterator[tuple[int, Norm]]:
    """By row, the norm that a state goes through on its way into one layer alone, or to the output."""
    if sites.has_reads or not edge_sources(sites):
        return
    modules = [_fed(site.state) for site in sites.layers]
    modules.append(_fed(sites.final) or sites.norm)
    for row, module in enumerate(modules):
        norm = understood(module) if module is not None and modules.count(module) == 1 else None
        if norm is not None:
            yield row, norm


def _fed(place: Place | None) -> nn.Module | None:
    """The module that is given the tensor there, if it runs but once in a forward."""
    return place.module if place is not None and place.is_input and place.turn is None else None


def _memory(x: Tensor) -> tuple:
    x = local(x)
    return x.data_ptr(), x.numel()
