"""Gates: a factor on every depth edge of a model, and on every layer as a whole.

An edge is what one read takes from one source. With all gates at 1 the model is as it was; its gradients there are
gradient × activation of all edges at once, and with a gate at 0 the edge is gone. In a model without depth reads the
edge to a layer is that of its branch alone: what the layer's norm receives changes, the stream around it does not.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probes.attributed import KEPT, MASS, SHARED
from probes.found_gates import FoundGates
from probes.graph import mixed_on_its_way
from probes.manifest import RunError
from probes.sites import Place, Sites, put

# What a read made: its row, its sources [B, T, D], their weights [B, T] (None: a plain sum) and the mix.
Watch = Callable[[int, list[Tensor], list[Tensor] | None, Tensor], None]


class Gates:
    """While `hung`, the forward of a model uses `edges` and `layers`.

    `edges` [R, S] or [B, R, S] is the factor of each source in each read; `layers` [L] or [B, L] that of each layer's
    output, for all that read it. None leaves all as they are; with `only` a read, the edges of the others are. `mass`
    says what becomes of the weight of a gated source in a softmax (`MASS`), and of that of a source all of whose layers
    are gated. `watch` is told what each read makes.

    `no_edges` says why the edges of this model cannot be gated, in a sentence, and is empty where they can; `reached` bool
    [R] tells the reads whose edges can, `gated` bool [L] the layers that can.
    """

    def __init__(self, sites: Sites, mass: str = KEPT):
        if mass not in MASS:
            raise RunError(f"mass must be {' or '.join(map(repr, MASS))}, not {mass!r}.")
        self.edges: Tensor | None = None
        self.layers: Tensor | None = None
        self.only: int | None = None
        self.watch: Watch | None = None
        self.layout = sites.layout
        self.gated = [site.output is not None for site in sites.layers]
        self.no_edges = _no_edges(sites)
        found = sites.found.reads if sites.found is not None else ()
        self.reached = [read.state is not None for read in found] or [True] * len(self.layout.reads)
        self._sites, self._mass = sites, mass
        self._outputs: dict[int, Tensor] = {}
        self._ended: Tensor | None = None  # what the last block returned, until the final norm has it
        self._states: list[Tensor] = []  # of a forward that is watched
        self._turns: Counter = Counter()
        self._found = FoundGates(sites.found, self._mixed) if sites.found is not None else None

    @contextmanager
    def hung(self) -> Iterator[None]:
        handles = []
        try:
            for handle in self._hang():
                handles.append(handle)
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    @property
    def ends_unseen(self) -> bool:
        """Whether in the latest forward no norm was given what the last block returned."""
        return self._ended is not None

    def ends_alone(self, target: Tensor) -> bool:
        """Whether that went into the target, as the graph of a watched forward has it, with no other state mixed into it."""
        nodes = [each.grad_fn for each in self._states if each.grad_fn is not None]
        return not mixed_on_its_way(self._ended, nodes, target)

    @property
    def outputs(self) -> dict[int, Tensor]:
        """The sources of the latest forward, by number, as far as they were seen."""
        return self._outputs

    def _forget(self, *_) -> None:
        self._ended = None
        self._states.clear()
        self._outputs.clear()
        self._turns.clear()
        if self._found is not None:
            self._found.forget()

    def _hang(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        sites = self._sites
        yield sites.root.register_forward_pre_hook(self._forget)
        for row, site in enumerate(sites.layers):
            if site.output is not None:
                yield self._at(site.output, lambda x, row=row: self._output(x, row))
        for module in sites.outputs:
            yield module.register_forward_pre_hook(
                lambda module, args: (self._output(args[0], module.depth_output - 1), *args[1:])
            )
        if self._found is not None:
            yield from self._found.hang()  # after the outputs, so that what it keeps is gated
        elif sites.reads:
            for row, read in enumerate(sites.reads):
                yield read.register_forward_hook(
                    lambda module, args, output, row=row: (
                        self._mixed(row, args[0], list(output[1]), output[0]),
                        output[1],
                    )
                )
        elif not self.no_edges:
            for row, site in enumerate(sites.layers):
                yield self._at(site.state, lambda x, row=row, given=site.given: self._state(x, row, given))
            last = len(sites.layers)
            yield self._at(sites.final, lambda x: self._leave(x, last))
            if sites.receiver is not None:
                yield self._at(sites.receiver, lambda x: self._receive(x, last))

    def _output(self, x: Tensor, row: int) -> Tensor:
        if self._sites.reads and x.ndim > 3:
            return x  # a stack that holds the output among other things; `sites.outputs` has it plain
        if self.layers is not None:
            x = x * _column(self.layers[..., row], x)
        self._outputs[row + 1] = x
        return x

    def _gates(self, row: int) -> Tensor | None:
        """Those of one read, or None where it is left as it is."""
        if self.edges is None or self.only not in (None, row):
            return None
        return self.edges[..., row, :]

    def _state(self, x: Tensor, row: int, given: int) -> Tensor:
        """The branch's own sum; the stream goes on as it was."""
        if row == 0:
            self._outputs[0] = x  # the embedding
        sources = [self._outputs[source].view_as(x) for source in range(given)]
        if self.watch is not None:
            self.watch(row, sources, None, x)
            self._states.append(x)
        if (gates := self._gates(row)) is not None:
            for source, output in enumerate(sources):
                x = x + _column(gates[..., source] - 1, x) * output
            x = x * _column(_any(gates[..., :given]), x)
        return x

    def _leave(self, x: Tensor, last: int) -> Tensor:
        x = self._state(x, last, last + 1)
        self._ended = None if self._sites.final.is_input else x
        return x

    def _receive(self, x: Tensor, last: int) -> Tensor:
        """What the final norm is given should be what the last block returns, if it has the stream's shape: whoever watches
        is told."""
        ended = self._ended
        if ended is not None and x.shape == ended.shape:
            self._ended = None
            if self.watch is not None and x is not ended:
                self.watch(last, [self._outputs[source].view_as(x) for source in range(last + 1)], None, x)
        return x

    def _mixed(self, row: int, sources: list[Tensor], weight: list[Tensor], mix: Tensor) -> Tensor:
        """The mix of a read, its weights gated."""
        if row == 0:
            self._outputs[0] = sources[0]
        if self.watch is not None:
            self.watch(row, sources, weight, mix)
        gates, left = self._gates(row), self._left(row, len(sources))
        if gates is None and left is None:
            return mix
        weights = [w.unsqueeze(-1).to(mix.dtype) for w in weight]
        changed = (
            weights if gates is None else [_column(gates[..., s], mix) * w for s, w in enumerate(weights)]
        )
        if self._mass == SHARED:
            still = (
                changed if left is None else [_column(g, mix) * w for g, w in zip(left, changed, strict=True)]
            )
            total = sum(still).clamp_min(torch.finfo(mix.dtype).tiny)  # nothing at all where none is left
            whole = sum(weights)  # one, where weights sum to it
            changed = [w * (whole / total) for w in changed]
        for source, before, after in zip(sources, weights, changed, strict=True):
            mix = mix + (after - before) * source
        return mix if gates is None else mix * _column(_any(gates[..., : len(sources)]), mix)

    def _left(self, row: int, count: int) -> list[Tensor] | None:
        """What the gates of layers leave of each source of a read where its weight goes with it, S times [] or [B]: all of
        the embedding, of one layer as its gate says, of several all until the last of them is gone."""
        if self._mass != SHARED or self.layers is None:
            return None
        found = []
        for source in self.layout.sources[:count]:
            # The output of layer l has number l; later ones are not there yet.
            mine = self.layers[..., max(source.first, 1) - 1 : min(source.last, row)]
            whole = not source.first or not mine.shape[-1]
            one = torch.ones_like(self.layers[..., 0])
            found.append(one if whole else mine[..., 0] if mine.shape[-1] == 1 else _any(mine).to(one.dtype))
        return found

    def _at(self, place: Place, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
        """Put `change` of the tensor at a place in its stead."""
        module: nn.Module = place.module
        key = object()

        def now() -> bool:
            self._turns[key] += 1
            return place.turn in (None, self._turns[key] - 1)

        if not place.is_input:
            return module.register_forward_hook(
                lambda module, args, output: (
                    _replaced(output, place, change(place.made(output))) if now() else output
                )
            )

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if not now():
                return args, kwargs
            changed = change(place.given(args, kwargs))
            if place.keyword in kwargs:
                return args, {**kwargs, place.keyword: put(kwargs[place.keyword], place.within, changed)}
            if args or place.keyword is not None:
                return put(args, (place.key, *place.within), changed), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: put(kwargs[first], place.within, changed)}

        return module.register_forward_pre_hook(before, with_kwargs=True)


def _no_edges(sites: Sites) -> str:
    """Why the depth edges of a model cannot be gated; empty where they can."""
    name = type(sites.root).__name__
    if sites.reads:
        return ""
    if sites.found is not None:
        for read, row in zip(sites.found.reads, sites.found.rows, strict=True):
            if row.sources > 1 and (read.state is None or read.replay.normalised):
                what = (
                    "what it mixes is normalised first" if read.replay.normalised else "its mix is not seen"
                )
                return f"The depth edges of {name} cannot be gated: of {row.label}, {what}."
        return ""
    hidden = [site.layer.label for site in sites.layers if site.output is None or site.state is None]
    if hidden:
        return (
            f"The depth edges of {name} cannot be gated: no module receives or returns just what {hidden[0]} reads or "
            "adds."
        )
    if sites.change or sites.final is None or sites.entry is not None:
        return (
            f"The depth edges of {name} cannot be gated: its stream is more than the sum of what layers add."
        )
    return ""


def _any(gates: Tensor) -> Tensor:
    """[..., S] to [...]: 0 where nothing is left, else 1. What rounding leaves of all that was taken away again, a norm would
    blow up to full size."""
    return (gates.detach() != 0).any(-1)


def _column(gate: Tensor, x: Tensor) -> Tensor:
    """[] or [B] as a factor for `x` [B, T, D]."""
    return gate.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _replaced(output: object, place: Place, x: Tensor) -> object:
    if isinstance(output, tuple | list):
        return put(output, (place.key, *place.within), x)
    if isinstance(output, dict):
        return put(output, (next(iter(output)), *place.within), x)
    return put(output, place.within, x)
