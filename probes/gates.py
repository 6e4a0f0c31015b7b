"""Gates: a factor on every depth edge of a model, and on every layer as a whole.

An edge is what one read takes from one source. With all gates at 1 the model is as it was; its gradients there are
gradient × activation of all edges at once, and with a gate at 0 the edge is gone. In a model without depth reads the
edge to a layer is that of its branch alone: what the layer's norm receives changes, the stream around it does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probes.manifest import RunError
from probes.sites import Place, Sites

KEPT, SHARED = "kept", "shared"
MASS = {
    KEPT: "a gated source keeps its share of the softmax, so the mix shrinks",
    SHARED: "the other sources take over its share of the softmax",
}


class Gates:
    """While `hung`, the forward of a model uses `edges` and `layers`.

    `edges` [R, S] or [B, R, S] is the factor of each source in each read; `layers` [L] or [B, L] that of each layer's
    output, for all that read it. None leaves all as they are. `mass` says what becomes of the weight of a gated source
    in a softmax (`MASS`). RunError for a model whose edges no hook reaches.
    """

    def __init__(self, sites: Sites, mass: str = KEPT):
        if mass not in MASS:
            raise RunError(f"mass must be {' or '.join(map(repr, MASS))}, not {mass!r}.")
        self.edges: Tensor | None = None
        self.layers: Tensor | None = None
        self.layout = sites.layout
        self._sites, self._mass = sites, mass
        self._outputs: list[Tensor] = []
        hidden = [site.layer.label for site in sites.layers if site.output is None or site.state is None]
        if hidden and not sites.reads:
            raise RunError(
                f"The depth edges of {type(sites.root).__name__} cannot be gated: no module receives or returns just "
                f"what {hidden[0]} reads or adds."
            )

    @contextmanager
    def hung(self) -> Iterator[None]:
        handles = list(self._hang())
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def _hang(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        sites = self._sites
        yield sites.root.register_forward_pre_hook(lambda *_: self._outputs.clear())
        for row, site in enumerate(sites.layers):
            if site.output is not None:
                yield _at(site.output, lambda x, row=row: self._output(x, row))
        if sites.reads:
            for row, read in enumerate(sites.reads):
                yield read.register_forward_hook(
                    lambda module, args, output, row=row: self._read(row, args[0], *output)
                )
            return
        for row, site in enumerate(sites.layers):
            yield _at(site.state, lambda x, row=row, given=site.given: self._state(x, row, given))
        yield _at(sites.final, lambda x: self._state(x, len(sites.layers), len(sites.layers) + 1))

    def _output(self, x: Tensor, row: int) -> Tensor:
        if self.layers is not None:
            x = x * _column(self.layers[..., row], x)
        self._outputs.append(x)
        return x

    def _state(self, x: Tensor, row: int, given: int) -> Tensor:
        """The branch's own sum; the stream goes on as it was."""
        if row == 0:
            self._outputs.insert(0, x)  # the embedding
        if self.edges is None:
            return x
        for source, output in enumerate(self._outputs[:given]):
            x = x + _column(self.edges[..., row, source] - 1, x) * output.view_as(x)
        return x

    def _read(self, row: int, sources: list[Tensor], mix: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.edges is None:
            return mix, weight
        gates = [_column(self.edges[..., row, s], mix) for s in range(len(sources))]
        weights = [w.unsqueeze(-1).to(mix.dtype) for w in weight]
        changed = [gate * w for gate, w in zip(gates, weights, strict=True)]
        if self._mass == SHARED:
            total = sum(changed).clamp_min(torch.finfo(mix.dtype).tiny)  # nothing at all where none is left
            changed = [w / total for w in changed]
        for source, before, after in zip(sources, weights, changed, strict=True):
            mix = mix + (after - before) * source
        return mix, weight


def _column(gate: Tensor, x: Tensor) -> Tensor:
    """[] or [B] as a factor for `x` [B, T, D]."""
    return gate.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _at(place: Place, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Put `change` of the tensor at a place in its stead."""
    module: nn.Module = place.module
    if not place.is_input:
        return module.register_forward_hook(
            lambda module, args, output: _replaced(output, place, change(place.made(output)))
        )

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        changed = change(place.given(args, kwargs))
        if place.keyword in kwargs:
            return args, {**kwargs, place.keyword: changed}
        if args or place.keyword is not None:
            return (*args[: place.key], changed, *args[place.key + 1 :]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: changed}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _replaced(output: object, place: Place, x: Tensor) -> object:
    if isinstance(output, tuple):
        parts = (*output[: place.key], x, *output[place.key + 1 :])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    if isinstance(output, list):
        return [*output[: place.key], x, *output[place.key + 1 :]]
    if isinstance(output, dict):
        output[next(iter(output))] = x
        return output
    return x
