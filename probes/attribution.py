"""Which depth sources cause the output? Attribution of a model's loss to its depth edges and its layers, after the fact.

Everything is measured with gates (gates.py), factors on the edges that are 1 in the model as it is. A value is always the
target *without* the edge or layer minus the target *with* it, estimated in its own way: above zero, a loss rises without
it. Values are signed and stay so: behind a norm, which forgets the size of what it is given, those of one read sum to
about zero.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from probes.attributed import (
    ABLATION,
    GRADIENT,
    INTEGRATED,
    KEPT,
    LOSS,
    METHODS,
    OF_LAYERS,
    REMOVAL,
    SHAPLEY,
    SHARED,
    About,
    Attribution,
)
from probes.batch import Batch
from probes.budget import Estimate
from probes.effects import Effects, jobs
from probes.finding import find_sites
from probes.gates import Gates
from probes.identity import tolerance
from probes.manifest import RunError
from probes.masks import Masks
from probes.objective import next_token_losses
from probes.results import Parts
from probes.sizes import bytes_in
from probes.target import arguments, said
from probes.unchanged import unchanged
from probes.work import Work

__all__ = [
    "ABLATION", "GRADIENT", "INTEGRATED", "METHODS", "REMOVAL", "SHAPLEY", "Attribution", "attribute",
]  # fmt: skip


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
    memory: float | str | None = None,
    progress: bool = False,
    announce: Callable[[Estimate], None] | None = None,
    parts: Parts | None = None,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> Attribution:
    """Attribute the loss of `model` on `batch` to its depth edges and its layers; the model is left as it was.

    `batch` is a tensor, a tuple of positional or a mapping of keyword arguments, B sequences in its first axis. `loss`
    makes one number for each sequence, [B], or for each of its tokens, [B, T], of the model's output (or one of all, and
    then they go through one by one); by default that is the cross-entropy of the next token. For a token's logit, or a difference of two, see `probes.objective.logit`.
    `methods` are names in `METHODS`, which says what they are: "ablation" is of edges, "removal" of layers, the others of
    both.

    `mass`, in a model with depth reads: "kept" leaves the weights of the others as they are when a source is removed,
    "shared" lets them take over its weight. `steps` is for integrated gradients and `samples` the orders tried for
    Shapley values, drawn with `seed`, or all where there are no more. With `what_if`, a batch of other sequences, the
    loss is measured on these when the least important layers and edges are removed (pruning.py).

    With E edges in R reads and L layers, gradient takes one forward and backward, removal L forwards, ablation E,
    integrated (R+1)·steps of both, shapley samples·(E + L) forwards. Sequences go through together as far as `memory`
    [bytes of the process, or "8GB"; by default half of what is free] allows. `announce` is told the estimate before the work
    begins. What is in `parts` is not computed again, and what is done is put there.

    Raises RunError for a model without recognisable layers or none that a hook reaches, an unknown method, one that needs
    edges where no hook reaches them, a forward that fails, a target of another shape or that is not finite, or too little
    memory.
    """
    _check(methods, mass, steps, samples)
    if loss is not None and not callable(loss):
        raise RunError(f"loss must be a function of what the model returns, not {loss!r}.")
    room = None if memory is None else bytes_in(memory, "memory")
    sites = find_sites(model, stack, layers, norms, example=batch)
    gates = Gates(sites, mass)
    root = sites.root
    objective = next_token_losses if loss is None else lambda output, *_: loss(output)
    mask_of = Masks(None, sites).of_model
    parts = {} if parts is None else parts
    _check_slopes(methods, root)
    with unchanged(root), _frozen(root), gates.hung():
        root.eval()
        whole = Batch(root, *arguments(batch), objective, gates, mask_of)
        other = None if what_if is None else Batch(root, *arguments(what_if), objective, gates, mask_of)
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
        work = Work(whole, other, jobs(gates, methods, steps, samples, seed), gates, parts, about)
        estimate = work.plan(room, timed=progress or announce is not None)
        if announce is not None:
            announce(estimate)
        total = estimate.seconds if estimate else None
        with tqdm(total=total, disable=not progress, bar_format=_BAR, postfix=_span(total)) as bar:
            found = work.done(lambda seconds: bar.update(min(seconds, max(0.0, (total or 0.0) - bar.n))))
    return found


# What is left is seen anew all the time, by how fast it went.
_BAR = "{percentage:3.0f}%|{bar:30}| {elapsed} gone, {remaining} left{postfix}"


def _span(seconds: float | None) -> str:
    return "" if seconds is None else f"{tqdm.format_interval(seconds)} were announced"


@contextmanager
def _frozen(root: nn.Module) -> Iterator[None]:
    """No gradients of parameters: only those of gates are asked for, and what the others would need is not kept."""
    learned = [p for p in root.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


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


def _check_slopes(methods: Sequence[str], root: nn.Module) -> None:
    inside = torch.is_inference_mode_enabled() or any(p.is_inference() for p in root.parameters())
    if inside and {GRADIENT, INTEGRATED} & {*methods}:
        raise RunError(
            "Under torch.inference_mode() nothing has a gradient: make the model and call attribute outside of it, or ask for "
            "ablation, removal or shapley."
        )


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

    gates.watch, alone = see, True
    try:
        one.base  # noqa: B018
        if gates.ends_unseen and not torch.is_inference_mode_enabled():
            with torch.enable_grad():
                alone = gates.ends_alone(one.value(None, one.layers.clone().requires_grad_()))
    except RunError:
        raise
    except Exception as error:  # whatever a model or a loss makes of what it is given
        raise RunError(
            f"A forward of {type(one._root).__name__} and its target failed on one sequence of the batch: {said(error)}."
        ) from error
    finally:
        gates.watch = None
    if not alone:
        gates.no_edges = (
            f"The depth edges of {type(one._root).__name__} cannot be gated: other states are mixed into what its last "
            "transformer block returns."
        )
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
