"""Which depth sources cause the output? Attribution of a model's loss to its depth edges and its layers, after the fact.

Everything is measured with gates (gates.py), factors on the edges that are 1 in the model as it is. A value is always the
target *without* the edge or layer minus the target *with* it, estimated in its own way: above zero, a loss rises without
it. Values are signed and stay so: behind a norm, which forgets the size of what it is given, those of one read sum to
about zero.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from probes import pruning
from probes.attributed import (
    ABLATION,
    EDGES,
    GRADIENT,
    INTEGRATED,
    KEPT,
    LAYERS,
    LOSS,
    METHODS,
    OF_LAYERS,
    REMOVAL,
    SHAPLEY,
    SHARED,
    About,
    Attribution,
)
from probes.budget import Estimate, bytes_of_one, resident, seconds_of, sequences_that_fit
from probes.effects import Effects, Job, jobs, sequences_of
from probes.finding import find_sites
from probes.gates import Gates
from probes.identity import tolerance
from probes.manifest import RunError
from probes.objective import next_token_losses, token_means
from probes.routed import Routed
from probes.target import arguments, said
from probes.unchanged import unchanged

__all__ = [
    "ABLATION", "GRADIENT", "INTEGRATED", "METHODS", "REMOVAL", "SHAPLEY", "Attribution", "attribute",
]  # fmt: skip

Parts = MutableMapping[str, np.ndarray]


def attribute(
    model: nn.Module,
    batch: object,
    *,
    methods: Sequence[str] = (GRADIENT, ABLATION, REMOVAL),
    loss: Callable[[object], Tensor] | None = None,
    mass: str = KEPT,
    steps: int = 16,
    samples: int = 8,
    seed: int = 0,
    what_if: object | None = None,
    memory: float | None = None,
    progress: bool = False,
    announce: Callable[[Estimate], None] | None = None,
    parts: Parts | None = None,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> Attribution:
    """Attribute the loss of `model` on `batch` to its depth edges and its layers; the model is left as it was.

    `batch` is a tensor, a tuple of positional or a mapping of keyword arguments, B sequences in its first axis. `loss`
    makes one number for each sequence, [B], or for each of its tokens, [B, T], of the model's output; by default that is
    the cross-entropy of the next token. For a token's logit, or a difference of two, see `probes.objective.logit`.
    `methods` are names in `METHODS`, which says what they are: "ablation" is of edges, "removal" of layers, the others of
    both.

    `mass`, in a model with depth reads: "kept" leaves the weights of the others as they are when a source is removed,
    "shared" lets them take over its weight. `steps` is for integrated gradients and `samples` the orders tried for
    Shapley values, drawn with `seed`, or all where there are no more. With `what_if`, a batch of other sequences, the
    loss is measured on these when the least important layers and edges are removed (pruning.py).

    With E edges in R reads and L layers, gradient takes one forward and backward, removal L forwards, ablation E,
    integrated (R+1)·steps of both, shapley samples·(E + L) forwards. Sequences go through together as far as `memory`
    [bytes of the process; by default half of what is free] allows. `announce` is told the estimate before the work
    begins. What is in `parts` is not computed again, and what is done is put there.

    Raises RunError for a model without recognisable layers or none that a hook reaches, an unknown method, one that needs
    edges where no hook reaches them, a forward that fails, a target of another shape or that is not finite, or too little
    memory.
    """
    _check(methods, mass, steps, samples)
    sites = find_sites(model, stack, layers, norms)
    gates = Gates(sites, mass)
    root = sites.root
    objective = next_token_losses if loss is None else lambda output, args, kwargs: loss(output)
    parts = {} if parts is None else parts
    with unchanged(root), gates.hung():
        root.eval()
        whole = _Batch(root, *arguments(batch), objective, gates)
        other = None if what_if is None else _Batch(root, *arguments(what_if), objective, gates)
        _check_stream(whole.part(0, 1))
        _check_reach(gates, methods, root)
        target, unit = _named(loss)
        about = About(
            target=target,
            unit=unit,
            mass=mass,
            steps=steps if INTEGRATED in methods else 0,
            samples=samples if SHAPLEY in methods else 0,
            seed=seed,
            sequences=whole.sequences,
            tokens=whole.tokens,
        )
        work = _Work(whole, other, jobs(gates, methods, steps, samples, seed), gates, parts, about)
        work.plan(memory, timed=progress or announce is not None)
        if announce is not None:
            announce(work.estimate)
        with tqdm(total=work.estimate.seconds, disable=not progress, bar_format=_BAR) as bar:
            found = work.done(lambda seconds: bar.update(min(seconds, bar.total - bar.n)))
            bar.update(bar.total - bar.n)
    return found


_BAR = "{percentage:3.0f}%|{bar:30}| {elapsed} gone, {remaining} left"


def _named(loss: Callable | None) -> tuple[str, str]:
    """What is attributed, and its unit: `probes.objective.logit` names its own; whatever else is given is a loss."""
    if loss is None:
        return LOSS, "nats per token"
    told = getattr(loss, "target", None), getattr(loss, "unit", None)
    return told if all(isinstance(each, str) for each in told) else (LOSS, "units of the target")


def _check(methods: Sequence[str], mass: str, steps: int, samples: int) -> None:
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        what = f"methods holds {', '.join(map(repr, unknown))}" if unknown else "methods is empty"
        raise RunError(f"{what}: choose among {', '.join(METHODS)}.")
    if INTEGRATED in methods and mass == SHARED:
        raise RunError(
            'Integrated gradients need mass="kept": shared weights do not change while all edges of a read grow.'
        )
    for name, count in (("steps", steps), ("samples", samples)):
        if not isinstance(count, int) or count < 1:
            raise RunError(f"{name} must be a whole number of at least 1, not {count!r}.")


def _check_stream(one: Effects) -> None:
    """See whether the states of a model without reads are the sums that its edges suppose."""
    gates, broken = one.gates, []

    def see(row: int, sources: list[Tensor], weight: list[Tensor] | None, state: Tensor) -> None:
        made = (
            sum(sources)
            if weight is None
            else sum(w.unsqueeze(-1) * v for w, v in zip(weight, sources, strict=True))
        )
        if (made - state).norm() > tolerance(state.dtype) * state.norm():
            broken.append(gates.layout.states[row])

    gates.watch = see
    try:
        one.base  # noqa: B018
    except RunError:
        raise
    except Exception as error:  # whatever a model or a loss makes of what it is given
        raise RunError(
            f"A forward of {type(one._root).__name__} and its target failed on one sequence of the batch: {said(error)}."
        ) from error
    finally:
        gates.watch = None
    if broken and not gates.no_edges:
        gates.no_edges = (
            f"The depth edges of {type(one._root).__name__} cannot be gated: the state {broken[0]} is not the weighted "
            "sum of the sources before it."
        )


def _check_reach(gates: Gates, methods: Sequence[str], root: nn.Module) -> None:
    if not any(gates.gated):
        raise RunError(
            f"Neither edges nor layers of {type(root).__name__} can be gated: no module returns just what a layer adds."
        )
    if gates.no_edges and not any(name in OF_LAYERS for name in methods):
        raise RunError(f"{gates.no_edges} Its layers can: ask for {REMOVAL} or {GRADIENT}.")


@dataclass(frozen=True)
class _Batch:
    """The arguments of one forward, of which a part of the sequences can be taken."""

    root: nn.Module
    args: tuple
    kwargs: Mapping
    objective: Callable
    gates: Gates

    @property
    def sequences(self) -> int:
        return sequences_of(self.args, self.kwargs)

    @property
    def tokens(self) -> int:
        """T, of the first tensor that has it."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        return next((x.shape[1] for x in tensors if x.ndim > 1), 1)

    def part(self, first: int, last: int) -> Effects:
        count = self.sequences

        def cut(x: object) -> object:
            return x[first:last] if isinstance(x, Tensor) and x.ndim and len(x) == count else x

        args, kwargs = tuple(map(cut, self.args)), {key: cut(x) for key, x in self.kwargs.items()}
        return Effects(self.root, args, kwargs, self.objective, self.gates)


class _Work:
    """All jobs on all sequences, some sequences at a time."""

    def __init__(
        self, whole: _Batch, other: _Batch | None, todo: list[Job], gates: Gates, parts: Parts, about: About
    ):
        self._whole, self._other, self._todo, self._gates, self._parts = whole, other, todo, gates, parts
        self._about = about

    def plan(self, memory: float | None, timed: bool) -> None:
        """How many sequences at once, and what that will cost, if somebody wants to know the time."""
        one = self._whole.part(0, 1)
        each = bytes_of_one(one)
        most = max(self._whole.sequences, self._other.sequences if self._other else 0)
        at_once = sequences_that_fit(each, most, memory, one.edges.device)
        # Parts that were done with so many at once fit no others.
        before = int(self._parts.get("at once", np.zeros(1))[0])
        if before > at_once:
            self._parts.clear()
        self._at_once = before if 0 < before <= at_once else at_once
        self._parts["at once"] = np.array([self._at_once])
        some = self._whole.part(0, min(self._at_once, self._whole.sequences))
        self._seconds = seconds_of(some) if timed else (1.0, 3.0)
        self._timed = some.sequences
        cost = [(key, self._cost(job.forwards, job.backwards, size)) for key, job, size in self._units()]
        forwards = sum(job.forwards for _, job, _ in self._units())
        backwards = sum(job.backwards for _, job, _ in self._units())
        if self._other is not None:
            counts = pruning.forwards(self._gates)
            cost += [
                (f"other {first}", self._cost(counts, 0, last - first))
                for first, last in self._pieces(self._other)
            ]
            forwards += counts * len(self._pieces(self._other))
        total = sum(seconds for _, seconds in cost)
        left = sum(seconds for key, seconds in cost if not self._is_done(key))
        self.estimate = Estimate(
            left,
            resident() + each * self._at_once,
            forwards,
            backwards,
            self._at_once,
            self._whole.sequences,
            1 - left / total if total else 0.0,
        )

    def _cost(self, forwards: int, backwards: int, size: int) -> float:
        forward, both = self._seconds
        return (forwards * forward + backwards * both) * size / self._timed

    def _is_done(self, key: str) -> bool:
        return f"{key}|done" in self._parts

    def _pieces(self, batch: _Batch) -> list[tuple[int, int]]:
        count = batch.sequences
        return [(first, min(first + self._at_once, count)) for first in range(0, count, self._at_once)]

    def _units(self):
        """(key, job, sequences) of every job on every piece."""
        for first, last in self._pieces(self._whole):
            for job in self._todo:
                yield f"{first}.{job.key}", job, last - first

    def done(self, tick: Callable[[float], object]) -> Attribution:
        base, routed = [], []
        for first, last in self._pieces(self._whole):
            effects = self._whole.part(first, last)
            routed.append(Routed.seen(effects))
            base.append(token_means(effects.base).double().cpu().numpy())
            self._check_finite(base[-1], first)
            for job in self._todo:
                key = f"{first}.{job.key}"
                if self._is_done(key):
                    continue
                for kind, found in job.run(effects).items():
                    self._parts[f"{key}|{kind}.value"] = found.value
                    if found.square is not None:
                        self._parts[f"{key}|{kind}.square"] = found.square
                # Last, for after any of these the work may end.
                self._parts[f"{key}|done"] = np.ones(1)
                tick(self._cost(job.forwards, job.backwards, last - first))
        found = self._assembled(float(np.concatenate(base).mean()), Routed.mean(routed))
        if self._other is not None:
            found = replace(found, curves=self._curves(found, tick))
        return found

    def _check_finite(self, values: np.ndarray, first: int) -> None:
        if not np.isfinite(values).all():
            number = first + int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise RunError(
                f"The {self._about.target} of the model as it is is no finite number on sequence {number}, so nothing can be "
                "attributed: take a checkpoint from before the model diverged, or leave out sequences of padding alone."
            )

    def _assembled(self, value: float, routed: Routed) -> Attribution:
        layout, gates = self._gates.layout, self._gates
        notes = [gates.no_edges] if gates.no_edges else []
        lacking = [layout.layers[row].label for row, able in enumerate(gates.gated) if not able]
        if lacking:
            notes.append(f"No module returns just what {lacking[0]} adds, so it was not attributed.")
        about = replace(self._about, value=value, notes=tuple(notes))
        found = Attribution(
            layout, about, weight=routed.weight, share=routed.share, final_share=routed.final_share
        )
        shapes = {EDGES: layout.triangle().shape, LAYERS: (len(layout.layers),)}
        exists = {EDGES: layout.triangle() & np.array(gates.reached)[:, None], LAYERS: np.array(gates.gated)}
        kinds: dict[tuple[str, str], None] = {}
        for job in self._todo:
            for kind in (EDGES, LAYERS) if job.method == GRADIENT and not gates.no_edges else (job.kind,):
                kinds[kind, job.method] = None
        for kind, method in kinds:
            value, square = (self._gathered(kind, method, what, shapes[kind]) for what in ("value", "square"))
            value[:, ~exists[kind]] = np.nan
            getattr(found, kind)[method] = value.mean(0)
            getattr(found, f"{kind}_std")[method] = value.std(0)
            if square is not None:
                spread = np.sqrt(np.maximum(square.mean(0) - value.mean(0) ** 2, 0))
                getattr(found, f"{kind}_token_std")[method] = np.where(exists[kind], spread, np.nan)
        return found

    def _gathered(self, kind: str, method: str, what: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """[B, *shape] of one method, NaN where no job was; None where none of its jobs has it."""
        found, any_there = np.full((self._whole.sequences, *shape), np.nan), False
        for first, last in self._pieces(self._whole):
            for job in self._todo:
                values = self._parts.get(f"{first}.{job.key}|{kind}.{what}")
                if job.method != method or values is None:
                    continue
                any_there = True
                if job.row is None:
                    found[first:last] = values.reshape(last - first, *shape)
                else:
                    # An edge's row is a read with so many sources, a layer's is its own.
                    found[first:last, job.row] = (
                        values[:, 0] if len(shape) == 1 else _padded(values, shape[1])
                    )
        return found if any_there or what == "value" else None

    def _curves(self, found: Attribution, tick: Callable[[float], object]) -> dict:
        plans = pruning.plans(found, self._gates, self._about.seed)
        values: dict[str, list[np.ndarray]] = {}
        weights = []
        for first, last in self._pieces(self._other):
            effects = self._other.part(first, last)
            weights.append(last - first)
            for plan in plans:
                key = f"other {first}|{plan.key}"
                if key not in self._parts:
                    self._parts[key] = plan.run(effects)
                    tick(self._cost(len(plan.counts) - 1, 0, last - first))
                values.setdefault(plan.key, []).append(self._parts[key])
            self._parts[f"other {first}|done"] = np.ones(1)
        mean = partial(np.average, axis=0, weights=weights)
        return pruning.curves(plans, {key: mean(np.stack(each)) for key, each in values.items()})


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, count - values.shape[1])), constant_values=np.nan)
