"""One checkpoint of a run attributed: the model, its tokens, the work and the file. Needs torch."""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from app import checkpoints, sequences, verdicts, words
from app.asking import Asked
from app.checkpoints import Checkpoint
from probes import attribution, target
from probes.attributed import LOSS, Attribution, attribution_path, read_attribution, write_attribution
from probes.batch import of_all, taken
from probes.budget import Estimate
from probes.effects import sequences_of
from probes.finding import find_sites
from probes.layout import difference
from probes.manifest import RunError
from probes.objective import logit
from probes.parts import Parts
from probes.unchanged import unchanged

Batch = tuple[Tensor, ...] | dict


class _Announced(Exception):
    """The seconds that it would take, where nobody wants more."""


def attribute_all(asked: Asked, paths: list[Path]) -> None:
    """Each checkpoint. Raises RunError before the long work on one begins."""
    seconds = [attribute_one(asked, path) for path in paths]
    if asked.dry_run and len(paths) > 1:
        click.echo(f"All {len(paths)} checkpoints: about {words.age(sum(seconds))}.", err=True)


def attribute_one(asked: Asked, path: Path) -> float:
    """The seconds that it took, or with `dry_run` would take. Raises RunError before long work begins."""
    run = asked.run
    checkpoint = checkpoints.read_checkpoint(path)
    step = asked.step if asked.step is not None else checkpoint.step
    if step is None:
        raise RunError(f"{path.name} does not tell its step: give it with --step.")
    model, own_batch, own_loss = _model(asked)
    if asked.device is not None:
        model, own_batch = _on(asked.device, model, own_batch)
    layout = find_sites(model, **asked.choice, example=own_batch).layout
    if other := difference(run.layout, layout):
        raise RunError(f"The model is not the one that {run.name} was recorded of: {other}.")
    checkpoints.take(model, checkpoint)
    name, batch, what_if = _batches(asked, model, own_batch)
    digest = _digest(asked, model, checkpoint, batch, what_if)
    result = attribution_path(run.path, step, digest)
    if result.exists():
        click.echo(f"Attributed already: {result} (delete it to ask anew).", err=True)
        _tell(read_attribution(run.path, result.name, run.layout), run.name)
        return 0.0
    announced: list[tuple[float, float]] = []

    def announce(estimate: Estimate) -> None:
        _announce(asked, step, estimate)
        announced.append((time.monotonic(), estimate.seconds))
        if asked.dry_run:
            raise _Announced

    with contextlib.suppress(_Announced), Parts(result.with_name(f".{result.name}.parts")) as parts:
        found = attribution.attribute(
            model,
            batch,
            methods=asked.methods,
            loss=_loss(asked, own_loss),
            mass=asked.mass,
            steps=asked.steps,
            samples=asked.samples,
            seed=asked.seed,
            what_if=what_if,
            memory=asked.memory,
            progress=True,
            announce=announce,
            parts=parts,
            **asked.choice,
        )
        about = replace(found.about, checkpoint=path.name, data=name, created=time.time())
        found = replace(found, about=about, step=step)
        write_attribution(result, found)
        parts.finish()
    ((begun, wanted),) = announced
    if asked.dry_run:
        return wanted
    took = f"{words.age(time.monotonic() - begun)} ({words.age(wanted)} were announced)"
    click.echo(f"Written after {took}{_peak()}: {result}", err=True)
    _tell(found, run.name)
    return time.monotonic() - begun


def _model(asked: Asked) -> tuple[nn.Module, Batch | None, Callable | None]:
    """The model, and the batch and the loss that its maker gave with it."""
    if asked.model is None:
        return checkpoints.own_model(asked.run), None, None
    made = target.load(asked.model)
    return made.model, None if made.args is None else (dict(made.kwargs) or made.args), made.loss


def _on(device: str, model: nn.Module, batch: Batch | None) -> tuple[nn.Module, Batch | None]:
    try:
        return model.to(device), tree_map_only(Tensor, lambda x: x.to(device), batch)
    # Without CUDA, torch asserts that it has it.
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RunError(f"The device {device!r} cannot be used here: {reason}.") from error


def _batches(asked: Asked, model: nn.Module, own: Batch | None) -> tuple[str, Batch, Batch | None]:
    """The name of the data, the sequences to attribute on, and others for the what-if."""
    count = asked.sequences * (2 if asked.what_if else 1)
    if asked.data is None and own is not None:
        return (f"batch of {asked.model}", *_halves(model, own, asked))
    if asked.data is None:
        name, ids = sequences.own_text(asked.run)
        found = sequences.windows(ids, count, asked.context, f"The {name}")
    else:
        name, may_be_fewer = asked.data.name, not asked.context_given
        found = sequences.sequences(asked.data, count, asked.context, or_fewer=may_be_fewer)
    tokens = torch.from_numpy(found)
    sequences.check_vocabulary(model, tokens, name)
    tokens = tokens.to(next(model.parameters()).device)
    # In turn, so that both see all of the text.
    return name, (tokens[0::2] if asked.what_if else tokens,), (tokens[1::2],) if asked.what_if else None


def _halves(model: nn.Module, own: Batch, asked: Asked) -> tuple[Batch, Batch | None]:
    args, kwargs = target.arguments(own)
    count = sequences_of(args, kwargs)
    if count < (2 if asked.what_if else 1):
        raise RunError(
            f"The batch of {asked.model} holds {words.counted(count, 'sequence')}, too few: return more of them."
        )
    with unchanged(model):
        model.eval()
        whole = of_all(model, args, kwargs)

    def cut(first: int, last: int) -> Batch:
        some, named = taken(args, kwargs, first, last, whole)
        return named or some

    size = min(asked.sequences, count // 2 if asked.what_if else count)
    return cut(0, size), cut(size, 2 * size) if asked.what_if else None


def _loss(asked: Asked, own: Callable | None) -> Callable | None:
    if asked.target == LOSS:
        return own
    first, *rest = asked.tokens
    return logit(first, asked.position, *rest)


def _digest(asked: Asked, model: nn.Module, checkpoint: Checkpoint, *batches: Batch | None) -> str:
    """Of everything that the numbers depend on: the same question finds its file again."""
    told = hashlib.sha256(checkpoint.digest.encode())
    for source in _sources(asked.model, model):
        told.update(source)
    for batch in batches:
        values = () if batch is None else batch.values() if isinstance(batch, dict) else batch
        for x in values:
            told.update(_bytes(x) if isinstance(x, Tensor) else repr(x).encode())
    names = (
        "methods",
        "target",
        "tokens",
        "position",
        "mass",
        "steps",
        "samples",
        "seed",
        "what_if",
        "model",
        "choice",
    )
    told.update(json.dumps([getattr(asked, name) for name in names]).encode())
    return told.hexdigest()[:12]


def _sources(name: str | None, model: nn.Module) -> list[bytes]:
    """The files that a model of one's own is written in, but torch's: those of its modules and of the function `name`."""
    if name is None:
        return []
    written = {
        name.partition(":")[0].removesuffix(".py"),
        *(type(each).__module__ for each in model.modules()),
    }
    files = {
        getattr(sys.modules.get(each), "__file__", None) for each in written if each.split(".")[0] != "torch"
    }
    return [Path(file).read_bytes() for file in sorted(filter(None, files))]


def _bytes(x: Tensor) -> bytes:
    """Of any kind of numbers; numpy knows no bfloat16."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _announce(asked: Asked, step: int, estimate: Estimate) -> None:
    done = f" {estimate.done:.0%} is done already." if estimate.done else ""
    click.echo(
        f"Step {words.step(step)} of {asked.run.name}: {estimate.forwards:,} forwards and {estimate.backwards:,} "
        f"with backward, {estimate.at_once} of {words.counted(estimate.sequences, 'sequence')} at a time; about "
        f"{words.age(estimate.seconds)} and {estimate.bytes / 1e9:.2g} GB.{done}",
        err=True,
    )


def _peak() -> str:
    """The most memory that this process held so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", with at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2g} GB"


def _tell(found: Attribution, name: str) -> None:
    for sentence in verdicts.sentences(found, name):
        click.echo(sentence)
