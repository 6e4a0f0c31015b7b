"""Effects: one batch of sequences under gates, and what every method makes of it, a part at a time.

Every value is the target without something minus the target with it, for each sequence.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from probes.attributed import ABLATION, EDGES, GRADIENT, INTEGRATED, LAYERS, OF_EDGES, REMOVAL, SHAPLEY
from probes.gates import Gates
from probes.manifest import RunError
from probes.objective import token_means


class Effects:
    """The target of each sequence of one batch, under gates."""

    def __init__(
        self,
        root: nn.Module,
        args: tuple,
        kwargs: Mapping,
        objective: Callable[[object, tuple, Mapping], Tensor],
        gates: Gates,
    ):
        self._root, self._args, self._kwargs = root, args, kwargs
        self._objective, self.gates = objective, gates
        self.sequences = sequences_of(args, kwargs)
        parameter = next(root.parameters())
        # Gradients of many tokens are summed up in a gate, so 16 bits will not do.
        options = {"device": parameter.device, "dtype": torch.promote_types(parameter.dtype, torch.float32)}
        self.exists = torch.as_tensor(gates.layout.triangle(), device=parameter.device)
        self.edges = torch.ones(self.sequences, *self.exists.shape, **options)
        self.layers = torch.ones(self.sequences, len(gates.layout.layers), **options)
        self._base: Tensor | None = None
        mask = kwargs.get("attention_mask")
        self.counts = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None  # padding does not

    def value(
        self, edges: Tensor | None = None, layers: Tensor | None = None, only: int | None = None
    ) -> Tensor:
        """[B, T] targets under edges [B, R, S] (of read `only`) and layers [B, L]; T is 1 for one of a whole sequence."""
        self.gates.edges, self.gates.layers, self.gates.only = edges, layers, only
        found = self._objective(self._root(*self._args, **self._kwargs), self._args, self._kwargs)
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != self.sequences:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RunError(
                f"loss must give one number for each sequence, [B], or for each of its tokens, [B, T]; of {self.sequences} "
                f"it gave {shape}."
            )
        return found if found.ndim == 2 else found[:, None]

    @property
    def base(self) -> Tensor:
        """[B, T] targets of the model as it is."""
        if self._base is None:
            with torch.no_grad():
                self._base = self.value()
        return self._base

    @torch.no_grad()
    def without(
        self, edges: Tensor | None = None, layers: Tensor | None = None, only: int | None = None
    ) -> Tensor:
        """[B, T] targets without some edges (bool [R, S], of read `only`) and layers (bool [L])."""
        return self.value(
            None if edges is None else self.edges.masked_fill(edges, 0),
            None if layers is None else self.layers.masked_fill(layers, 0),
            only,
        )


def sequences_of(args: tuple, kwargs: Mapping) -> int:
    """B, of the arguments of a forward."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise RunError("The batch holds no tensor: give the model's input.")
    return len(tensors[0])


@dataclass(frozen=True)
class Found:
    """`value` [B, n]: mean over tokens of the effects of n edges or layers; `square` [B, n], of their squares, None where
    the method knows no single tokens."""

    value: np.ndarray
    square: np.ndarray | None = None


@dataclass(frozen=True)
class Job:
    """A part of one method: of the edges of read `row`, of one layer (removal), or of everything (None). It takes so many
    forwards, and forwards with backward. `run` gives what was found of "edges" and of "layers"."""

    method: str
    kind: str
    row: int | None
    forwards: int
    backwards: int
    run: Callable[[Effects], dict[str, Found]]

    @property
    def key(self) -> str:
        return f"{self.kind}.{self.method}.{'' if self.row is None else self.row}"


def jobs(gates: Gates, methods: Sequence[str], steps: int, samples: int, seed: int) -> list[Job]:
    """The jobs of some methods, in an order that begins with the cheapest; edges only where they can be gated."""
    layout, with_edges = gates.layout, not gates.no_edges
    made: list[Job] = []
    reads = [(row, read.sources) for row, read in enumerate(layout.reads) if gates.reached[row]]
    layers = [row for row, able in enumerate(gates.gated) if able]
    for method in sorted(methods, key=list((GRADIENT, REMOVAL, ABLATION, INTEGRATED, SHAPLEY)).index):
        if method == GRADIENT:
            made.append(
                Job(method, EDGES if with_edges else LAYERS, None, 0, 1, lambda e: _gradient(e, with_edges))
            )
        elif method == REMOVAL:
            made += [Job(method, LAYERS, row, 1, 0, lambda e, row=row: _removal(e, row)) for row in layers]
        elif method in OF_EDGES and with_edges:
            made += list(_of_reads(method, reads, steps, samples, seed))
        if method == INTEGRATED:
            made.append(Job(method, LAYERS, None, 0, steps, lambda e: _integrated_layers(e, steps)))
        elif method == SHAPLEY:
            orders = _orders(len(layers), samples, seed)
            made.append(
                Job(
                    method,
                    LAYERS,
                    None,
                    1 + len(orders) * (len(layers) - 1),
                    0,
                    lambda e, orders=orders: _shapley_layers(e, layers, orders),
                )
            )
    return made


def _of_reads(
    method: str, reads: list[tuple[int, int]], steps: int, samples: int, seed: int
) -> Iterator[Job]:
    for row, count in reads:
        if method == ABLATION:
            yield Job(method, EDGES, row, count, 0, lambda e, row=row, n=count: _ablation(e, row, n))
        elif method == INTEGRATED:
            yield Job(method, EDGES, row, 0, steps, lambda e, row=row: _integrated(e, row, steps))
        else:
            orders = _orders(count, samples, seed + row)
            yield Job(
                method,
                EDGES,
                row,
                1 + len(orders) * (count - 1),
                0,
                lambda e, row=row, n=count, orders=orders: _shapley(e, row, n, orders),
            )


def _gradient(e: Effects, with_edges: bool) -> dict[str, Found]:
    edges, layers = e.edges.clone().requires_grad_(), e.layers.clone().requires_grad_()
    with torch.enable_grad():
        total = token_means(e.value(edges if with_edges else None, layers)).sum()
        # A sequence's target depends on its own gates alone.
        wanted = (edges, layers) if with_edges else (layers,)
        slopes = torch.autograd.grad(total, wanted, allow_unused=True)
    slopes = [
        torch.zeros_like(x) if slope is None else slope for slope, x in zip(slopes, wanted, strict=True)
    ]
    found = {LAYERS: _plain(-slopes[-1])}
    if with_edges:
        found[EDGES] = _plain(-slopes[0].flatten(1))
    return found


def _removal(e: Effects, row: int) -> dict[str, Found]:
    chosen = torch.zeros(e.layers.shape[1], dtype=torch.bool, device=e.layers.device)
    chosen[row] = True
    return {LAYERS: _spread([e.without(layers=chosen) - e.base])}


def _ablation(e: Effects, row: int, count: int) -> dict[str, Found]:
    effects = []
    for source in range(count):
        one = torch.zeros_like(e.exists)
        one[row, source] = True
        effects.append(e.without(one, only=row) - e.base)
    return {EDGES: _spread(effects)}


def _integrated(e: Effects, row: int, steps: int) -> dict[str, Found]:
    """The midpoint rule on each read's own path, the other reads as they are."""
    found = torch.zeros_like(e.edges[:, row])
    for step in range(steps):
        edges = e.edges.clone()
        edges[:, row] = (step + 0.5) / steps
        edges.requires_grad_()
        with torch.enable_grad():
            total = token_means(e.value(edges, only=row)).sum()
            (slope,) = torch.autograd.grad(total, edges, allow_unused=True)
        if slope is not None:
            found -= slope[:, row] / steps
    return {EDGES: _plain(found[:, : int(e.exists[row].sum())])}


def _integrated_layers(e: Effects, steps: int) -> dict[str, Found]:
    found = torch.zeros_like(e.layers)
    for step in range(steps):
        layers = torch.full_like(e.layers, (step + 0.5) / steps).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(token_means(e.value(None, layers)).sum(), layers)
        found -= slope / steps
    return {LAYERS: _plain(found)}


def _shapley(e: Effects, row: int, count: int, orders: list[Sequence[int]]) -> dict[str, Found]:
    """Edges of a read are added in a drawn order to the read without any; the other reads as they are."""
    removed = torch.zeros_like(e.exists)
    removed[row, :count] = True
    nothing = e.without(removed, only=row)
    found = [torch.zeros_like(nothing) for _ in range(count)]
    for order in orders:
        missing, before = removed.clone(), nothing
        for place in order:
            missing[row, place] = False
            after = e.without(missing, only=row) if missing.any() else e.base
            found[place] += (before - after) / len(orders)
            before = after
    return {EDGES: _spread(found)}


def _shapley_layers(e: Effects, able: list[int], orders: list[Sequence[int]]) -> dict[str, Found]:
    """Layers are added in a drawn order to the model without any."""
    removed = torch.zeros(e.layers.shape[1], dtype=torch.bool, device=e.layers.device)
    removed[able] = True
    nothing = e.without(layers=removed)
    found = [torch.zeros_like(nothing) for _ in removed]
    for order in orders:
        missing, before = removed.clone(), nothing
        for place in order:
            missing[able[place]] = False
            after = e.without(layers=missing) if missing.any() else e.base
            found[able[place]] += (before - after) / len(orders)
            before = after
    return {LAYERS: _spread(found)}


def _orders(count: int, samples: int, seed: int) -> list[Sequence[int]]:
    """Drawn orders of so many, or all of them where there are no more."""
    if math.factorial(min(count, 12)) <= samples and count < 12:
        return list(itertools.permutations(range(count)))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(samples)]


def _plain(value: Tensor) -> Found:
    return Found(value.detach().double().cpu().numpy())


def _spread(effects: list[Tensor]) -> Found:
    """Of n effects [B, T]."""
    value = torch.stack([token_means(each) for each in effects], 1)
    tokens = all(each.shape[1] > 1 for each in effects)
    square = torch.stack([token_means(each.square()) for each in effects], 1) if tokens else None
    return Found(value.double().cpu().numpy(), None if square is None else square.double().cpu().numpy())
