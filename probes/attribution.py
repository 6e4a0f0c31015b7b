"""Which depth sources cause the output? Attribution of a model's loss to its depth edges and its layers, after the fact.

Everything is measured with gates (gates.py), factors on the edges that are 1 in the model as it is. A value is always
loss *with* the edge minus loss *without* it, estimated in its own way: below zero, the edge lowers the loss. Values are
signed and stay so: behind a norm, which forgets the size of what it is given, those of one read sum to about zero.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from probes.finding import find_sites
from probes.gates import KEPT, SHARED, Gates
from probes.layout import Layout
from probes.manifest import RunError
from probes.target import arguments
from probes.unchanged import unchanged

GRADIENT, ABLATION, INTEGRATED, SHAPLEY = "gradient", "ablation", "integrated", "shapley"
METHODS = {
    GRADIENT: "gradient × activation: the slope of the loss in the edge's factor, at the model as it is",
    ABLATION: "the loss minus the loss without this edge",
    INTEGRATED: "integrated gradients: the slope, averaged while all edges of a read grow from 0 to 1",
    SHAPLEY: "Shapley values, sampled: the edge's effect averaged over orders in which a read's edges are added",
}


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found, in units of the loss.

    `edges[method]` [R, S] and `layers[method]` [L] are means over the sequences of the batch, `edges_std` and
    `layers_std` their standard deviations; NaN where there is no such edge. `loss` is that of the model as it is,
    `mass` what becomes of the weight of a removed source.
    """

    layout: Layout
    loss: float
    mass: str
    edges: dict[str, np.ndarray] = field(default_factory=dict)
    edges_std: dict[str, np.ndarray] = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    layers_std: dict[str, np.ndarray] = field(default_factory=dict)


def attribute(
    model: nn.Module,
    batch: object,
    *,
    methods: Sequence[str] = (GRADIENT, ABLATION),
    loss: Callable[[object], Tensor] | None = None,
    mass: str = KEPT,
    steps: int = 16,
    samples: int = 8,
    seed: int = 0,
    progress: bool = False,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> Attribution:
    """Attribute the loss of `model` on `batch` to its depth edges and its layers; the model is left as it was.

    `batch` is a tensor, a tuple of positional or a mapping of keyword arguments, B sequences in its first axis. `loss`
    makes one number for each sequence, [B], of the model's output; by default that is the mean cross-entropy of the next
    token. For a token's logit, or a difference of two, give a function that picks it. `methods` are names in `METHODS`,
    which says what they are; layers are attributed by gradient and by ablation (their removal).

    `mass`, in a model with depth reads: "kept" leaves the weights of the others as they are when a source is removed,
    "shared" lets them take over its weight. `steps` is for integrated gradients and `samples` the orders tried for
    Shapley values, drawn with `seed`, or all where there are no more. With E edges in R reads and L layers, gradient takes one forward and backward,
    ablation E + L forwards, integrated R·steps of both, shapley samples·(E + R) forwards; never more than one at a time
    is in memory.

    Raises RunError for a model without recognisable layers or whose edges no hook reaches, an unknown method, or a loss
    of another shape.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise RunError(f"methods holds {', '.join(map(repr, unknown))}: choose among {', '.join(METHODS)}.")
    if INTEGRATED in methods and mass == SHARED:
        raise RunError(
            'Integrated gradients need mass="kept": shared weights do not change while all edges of a read grow.'
        )
    for name, count in (("steps", steps), ("samples", samples)):
        if not isinstance(count, int) or count < 1:
            raise RunError(f"{name} must be a whole number of at least 1, not {count!r}.")
    sites = find_sites(model, stack, layers, norms)
    gates = Gates(sites, mass)
    args, kwargs = arguments(batch)
    run = _Loss(
        sites.root, args, kwargs, loss or (lambda output: next_token_loss(output, args, kwargs)), gates
    )
    with unchanged(sites.root), gates.hung():
        sites.root.eval()
        base = run.plain()
        found = Attribution(sites.layout, base.mean().item(), mass)
        todo = {
            GRADIENT: lambda: _gradient(run),
            ABLATION: lambda: _ablation(run, base, progress),
            INTEGRATED: lambda: (_integrated(run, steps, progress), None),
            SHAPLEY: lambda: (_shapley(run, base, samples, seed, progress), None),
        }
        for name in methods:
            edges, layers_too = todo[name]()
            edges = edges.masked_fill(~run.exists, torch.nan)
            found.edges[name], found.edges_std[name] = _spread(edges)
            if layers_too is not None:
                found.layers[name], found.layers_std[name] = _spread(layers_too)
    return found


def _spread(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the sequences."""
    values = values.double().cpu()
    return values.mean(0).numpy(), values.std(0, correction=0).numpy()


def next_token_loss(output: object, args: tuple, kwargs: Mapping) -> Tensor:
    """Mean cross-entropy of the next token of each sequence, [B], from logits [B, T, V]. RunError where there are none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    tokens = kwargs.get("input_ids", args[0] if args else next(iter(kwargs.values()), None))
    fits = isinstance(logits, Tensor) and logits.ndim == 3 and isinstance(tokens, Tensor)
    if not fits or tokens.is_floating_point() or logits.shape[:2] != tokens.shape:
        raise RunError(
            "The model does not give logits [B, T, V] of tokens [B, T]: pass loss=, a function of its output that gives "
            "one number for each sequence."
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


class _Loss:
    """The loss of each sequence, under gates."""

    def __init__(
        self, root: nn.Module, args: tuple, kwargs: Mapping, loss: Callable[[object], Tensor], gates: Gates
    ):
        self._root, self._args, self._kwargs, self._loss, self._gates = root, args, kwargs, loss, gates
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
        if not tensors:
            raise RunError("The batch holds no tensor: give the model's input.")
        self.sequences = len(tensors[0])
        parameter = next(root.parameters())
        # Gradients of many tokens are summed up in a gate, so 16 bits will not do.
        options = {"device": parameter.device, "dtype": torch.promote_types(parameter.dtype, torch.float32)}
        self.exists = torch.as_tensor(gates.layout.triangle(), device=parameter.device)
        self.edges = torch.ones(self.sequences, *self.exists.shape, **options)
        self.layers = torch.ones(self.sequences, len(gates.layout.layers), **options)

    def __call__(self, edges: Tensor | None, layers: Tensor | None = None) -> Tensor:
        """[B] losses under edges [B, R, S] and layers [B, L]."""
        self._gates.edges, self._gates.layers = edges, layers
        loss = self._loss(self._root(*self._args, **self._kwargs))
        if not isinstance(loss, Tensor) or loss.shape != (self.sequences,):
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RunError(
                f"loss must give one number for each of {self.sequences} sequences, [{self.sequences}], not {shape}."
            )
        return loss

    @torch.no_grad()
    def plain(self) -> Tensor:
        return self(None)

    @torch.no_grad()
    def without(self, edges: Tensor | None = None, layer: int | None = None) -> Tensor:
        """[B] losses without some edges (bool [R, S]), or without what a layer adds."""
        if layer is None:
            return self(self.edges.masked_fill(edges, 0))
        kept = self.layers.clone()
        kept[:, layer] = 0
        return self(None, kept)


def _gradient(run: _Loss) -> tuple[Tensor, Tensor]:
    edges, layers = run.edges.clone().requires_grad_(), run.layers.clone().requires_grad_()
    with torch.enable_grad():
        # A sequence's loss depends on its own gates alone.
        return torch.autograd.grad(run(edges, layers).sum(), (edges, layers))


def _ablation(run: _Loss, base: Tensor, progress: bool) -> tuple[Tensor, Tensor]:
    edges, layers = torch.zeros_like(run.edges), torch.zeros_like(run.layers)
    each = [("edge", *place) for place in run.exists.nonzero().tolist()]
    each += [("layer", layer, 0) for layer in range(layers.shape[1])]
    for kind, row, source in tqdm(each, ABLATION, disable=not progress):
        if kind == "layer":
            layers[:, row] = base - run.without(layer=row)
            continue
        one = torch.zeros_like(run.exists)
        one[row, source] = True
        edges[:, row, source] = base - run.without(one)
    return edges, layers


def _integrated(run: _Loss, steps: int, progress: bool) -> Tensor:
    """The midpoint rule on each read's own path, the other reads as they are."""
    found = torch.zeros_like(run.edges)
    for row in tqdm(range(len(run.exists)), INTEGRATED, disable=not progress):
        for step in range(steps):
            edges = run.edges.clone()
            edges[:, row] = (step + 0.5) / steps
            edges.requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(run(edges).sum(), edges)
            found[:, row] += slope[:, row] / steps
    return found


def _shapley(run: _Loss, base: Tensor, samples: int, seed: int, progress: bool) -> Tensor:
    """Edges of a read are added in a drawn order to the read without any; the other reads as they are."""
    found = torch.zeros_like(run.edges)
    generator = torch.Generator().manual_seed(seed)
    for row in tqdm(range(len(run.exists)), SHAPLEY, disable=not progress):
        count = int(run.exists[row].sum())
        removed = torch.zeros_like(run.exists)
        removed[row] = run.exists[row]
        nothing = run.without(removed)
        orders = _orders(count, samples, generator)
        for order in orders:
            missing, before = removed.clone(), nothing
            for place in order:
                missing[row, place] = False
                after = run.without(missing) if missing.any() else base
                found[:, row, place] += (after - before) / len(orders)
                before = after
    return found


def _orders(count: int, samples: int, generator: torch.Generator) -> list[Sequence[int]]:
    """Drawn orders of so many edges, or all of them where there are no more."""
    if math.factorial(count) <= samples:
        return list(itertools.permutations(range(count)))
    return [torch.randperm(count, generator=generator).tolist() for _ in range(samples)]
