"""Effects: one batch of sequences under gates, and what every method makes of it, a part at a time.

Every value is the target without something minus the target with it, for each sequence.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from probes.attributed import ABLATION, EDGES, GRADIENT, INTEGRATED, LAYERS, OF_EDGES, REMOVAL, SHAPLEY
from probes.gates import Gates
from probes.manifest import RunError
from probes.objective import Objective, token_means


class Effects:
    """The target of each sequence of one batch, under gates.

    `mask` [B, T] is zero where a token does not count. `passed` is called after each forward.
    """

    def __init__(
        self,
        root: nn.Module,
        args: tuple,
        kwargs: Mapping,
        objective: Objective,
        gates: Gates,
        mask: Tensor | None = None,
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
        self.counts = None if mask is None else mask.bool()
        self.passed: Callable[[], object] = lambda: None
        self._base: Tensor | None = None

    def value(
        self, edges: Tensor | None = None, layers: Tensor | None = None, only: int | None = None
    ) -> Tensor:
        """[B, T] targets under edges [B, R, S] (of read `only`) and layers [B, L]; T is 1 for one of a whole sequence."""
        found = self._target(edges, layers, only)
        if isinstance(found, Tensor) and not found.ndim and self.sequences == 1:
            found = found[None]
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != self.sequences:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RunError(
                f"loss must give one number for each sequence, [B], or for each of its tokens, [B, T]; of {self.sequences} "
                f"it gave {shape}."
            )
        return found if found.ndim == 2 else found[:, None]

    def _target(self, edges: Tensor | None, layers: Tensor | None, only: int | None) -> object:
        self.gates.edges, self.gates.layers, self.gates.only = edges, layers, only
        output = self._root(*self._args, **self._kwargs)
        self.passed()
        return self._objective(output, self._args, self._kwargs, self.counts)

    @property
    @torch.no_grad()
    def is_one_number(self) -> bool:
        """Whether the target is one of all sequences together: then they must go through one by one."""
        found = self._target(None, None, None)
        return isinstance(found, Tensor) and not found.ndim

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
    return len(first_of(args, kwargs))


def first_of(args: tuple, kwargs: Mapping) -> Tensor:
    """What holds the sequences in its first axis: the argument called so, else the first tensor."""
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    tensors = [x for x in (*named, *args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise RunError("The batch holds no tensor: give the model's input.")
    if not len(tensors[0]):
        raise RunError("The batch holds no sequence: give at least one.")
    return tensors[0]


@dataclass(frozen=True)
class Found:
    """`value` [B, n]: mean over tokens of the effects of n edges or layers; `square` [B, n], of their squares, None where
    the method knows no single tokens."""

    value: np.ndarray
    square: np.ndarray | None = None


@dataclass(frozen=True)
class Job:
    """A part of one method: of the edges of read `row`, of one layer (removal), or of everything (None). It takes so many
    passes, each a forward and, if `backward`, its backward; `once` does one of them, and those of a `kin` take as long,
    at the same row. `run` gives what was found of "edges" and of "layers"."""

    method: str
    kind: str
    row: int | None
    passes: int
    run: Callable[[Effects], dict[str, Found]]
    once: Callable[["Effects"], object]
    backward: bool = False

    @property
    def key(self) -> str:
        return f"{self.kind}.{self.method}.{'' if self.row is None else self.row}"

    @property
    def kin(self) -> str:
        return f"{self.method} of {self.kind}" if self.backward else self.kind


def jobs(gates: Gates, methods: Sequence[str], steps: int, samples: int, seed: int) -> list[Job]:
    """The jobs of some methods, in an order that begins with the cheapest; edges only where they can be gated."""
    layout, with_edges = gates.layout, not gates.no_edges
    made: list[Job] = []
    reads = [(row, read.sources) for row, read in enumerate(layout.reads) if gates.reached[row]]
    layers = [row for row, able in enumerate(gates.gated) if able]
    for method in sorted(methods, key=list((GRADIENT, REMOVAL, ABLATION, INTEGRATED, SHAPLEY)).index):
        if method == GRADIENT:
            run = partial(_gradient, with_edges=with_edges)
            made.append(Job(method, EDGES if with_edges else LAYERS, None, 1, run, run, backward=True))
        elif method == REMOVAL:
            made += [Job(method, LAYERS, row, 1, run := partial(_removal, row=row), run) for row in layers]
        elif method in OF_EDGES and with_edges:
            made += list(_of_reads(method, reads, steps, samples, seed))
        if method == INTEGRATED:
            run, once = (partial(_integrated_layers, steps=count) for count in (steps, 1))
            made.append(Job(method, LAYERS, None, steps, run, once, backward=True))
        elif method == SHAPLEY:
            orders = _orders(len(layers), samples, seed)
            run = partial(_shapley_layers, able=layers, orders=orders)
            once = partial(_removal, row=layers[len(layers) // 2]) if layers else run
            made.append(Job(method, LAYERS, None, 1 + len(orders) * (len(layers) - 1), run, once))
    return made


def _of_reads(
    method: str, reads: list[tuple[int, int]], steps: int, samples: int, seed: int
) -> Iterator[Job]:
    for row, count in reads:
        without_one = partial(_ablation, row=row, count=1)
        if method == ABLATION:
            run = partial(_ablation, row=row, count=count)
            yield Job(method, EDGES, row, count, run, without_one)
        elif method == INTEGRATED:
            run, once = (partial(_integrated, row=row, steps=n) for n in (steps, 1))
            yield Job(method, EDGES, row, steps, run, once, backward=True)
        else:
            orders = _orders(count, samples, seed + row)
            run = partial(_shapley, row=row, count=count, orders=orders)
            yield Job(method, EDGES, row, 1 + len(orders) * (count - 1), run, without_one)


def _gradient(e: Effects, with_edges: bool) -> dict[str, Found]:
    edges, layers = e.edges.clone().requires_grad_(), e.layers.clone().requires_grad_()
    # A sequence's target depends on its own gates alone.
    wanted = (edges, layers) if with_edges else (layers,)
    slopes = _slopes(lambda: e.value(edges if with_edges else None, layers), wanted)
    found = {LAYERS: _plain(-slopes[-1])}
    if with_edges:
        found[EDGES] = _plain(-slopes[0].flatten(1))
    return found


def _slopes(
    target: Callable[[], Tensor], wanted: Sequence[Tensor], may_be_none: bool = False
) -> list[Tensor]:
    """Gradients of the summed targets of all sequences; RunError where there is nothing to differentiate, unless that
    `may_be_none`: of one read, whose mix nobody may use."""
    with torch.enable_grad():
        total = token_means(target()).sum()
    if not total.requires_grad:
        if may_be_none:
            return [torch.zeros_like(x) for x in wanted]
        raise RunError(
            "The target has no gradient: it is detached, or computed without one. Make it of the model's output as it is, or "
            "ask for ablation, removal or shapley."
        )
    slopes = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for slope, x in zip(slopes, wanted, strict=True)]


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
        (slope,) = _slopes(lambda edges=edges: e.value(edges, only=row), (edges,), may_be_none=True)
        found -= slope[:, row] / steps
    return {EDGES: _plain(found[:, : int(e.exists[row].sum())])}


def _integrated_layers(e: Effects, steps: int) -> dict[str, Found]:
    found = torch.zeros_like(e.layers)
    for step in range(steps):
        layers = torch.full_like(e.layers, (step + 0.5) / steps).requires_grad_()
        (slope,) = _slopes(lambda layers=layers: e.value(None, layers), (layers,))
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
