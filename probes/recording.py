"""Begin a recording: one line in the training script.

    recorder = probes.record(model, "runs/my-run", optimizer=optimizer)

What was asked for is checked, the layers are found, and the writer is begun before the recorder is put together.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from probes.compiled import prepare_compiler
from probes.faults import Faults
from probes.finding import find_sites
from probes.following import Decode
from probes.manifest import Manifest, RunError
from probes.masks import MaskOf, Masks
from probes.mirrors import Mirror, Send
from probes.parallel import Parallel, judge_wrappers
from probes.pipeline import stages_of
from probes.place import join
from probes.processes import Meeting, meet
from probes.provenance import model_config, versions
from probes.ranks import LOCAL, MERGED, ONE, Ranks
from probes.recorder import Recorder
from probes.resuming import first_step, seconds_before
from probes.run import place_of
from probes.scaling import LossScale
from probes.schedule import Schedule, Steps, schedule
from probes.stages import told_of, whole
from probes.together import Together
from probes.vocabulary import METRICS, OF_ONE
from probes.watched import Part
from probes.wrapped import unwrap_optimizer
from probes.writer import RunWriter

if TYPE_CHECKING:
    from probes.remote.uploading import Upload

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def record(
    model: nn.Module | object,
    path: str | os.PathLike,
    *,
    optimizer: Optimizers | None = None,
    scaler: torch.amp.GradScaler | None = None,
    mask: str | MaskOf | None = None,
    every: Steps = 10,
    matrices_every: Steps = 100,
    tokens_every: Steps | None = None,
    decode: Decode | None = None,
    config: dict | None = None,
    tags: Sequence[str] = (),
    mirror: str | Send | None = None,
    resume: bool | int = False,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
    example: object = None,
    ranks: str = MERGED,
    strict: bool = False,
) -> "Recorder":
    """Attach probes to `model` and record its training at `path`, a new folder or, with `resume`, a run to continue.

    A `path` like s3://bucket/runs/a is recorded by way of a folder of this machine, from which it is sent in the
    background; see docs/remote.md. Of a pipeline, `model` is the schedule (torch.distributed.pipelining) that runs the
    stage of each process.

    Call it before the first forward, also before torch.compile has run. Step s is the number of optimizer
    steps completed; vectors are recorded every `every` steps, matrices (and vectors with them) every
    `matrices_every`. Either may also be a range of steps, `probes.log_spaced()`, or a list of such parts, as
    `[range(100), 10]` for each of the first 100 steps and then every 10; step 0 is always recorded. Without an
    `optimizer` call `recorder.step()` after each update; of several, a step is complete when each has
    stepped. A step is all forwards whose gradients the optimizer takes, at the parameters the step began with.

    The layers are found by themselves (`probes.describe` shows how). Where a model has several stacks of transformer
    blocks, `stack` names the one to record; where none is found, `layers` and `norms` are patterns over
    `named_modules()` for the sublayers, and for the modules that receive each layer's state and the final one. A
    number of `layers` is for a model that names its tensors itself with `probes.mark`. Where what a model reads is found by
    running it (docs/foreign-models.md), `example` is what it is called with: a tensor, a tuple of positional or a mapping
    of keyword arguments, such as a batch; by default tokens, vectors or images are invented.

    `scaler`: the GradScaler of mixed-precision training; gradients are recorded unscaled.
    `mask`: which tokens count. The name of an argument of the model's forward, or a function of its
    (args, kwargs), that gives [B, T], zero where a token does not count; by default `attention_mask`.
    `tokens_every`: when to record the depth weights token by token, of the first two sequences (up to 128 tokens) of the
    first training batch, which go through the model once more for it; None: never. `decode` gives the text of a list of
    token ids.
    `resume`: continue the run at `path`, or begin it where there is none. Give the step at which training goes on, the
    number of optimizer steps that the checkpoint has seen; True takes it from the state of an Adam-like optimizer that
    has been loaded. Rows from that step on that were recorded before are hidden by the new ones, and kept.
    `config` (JSON values) is stored beside the model's own configuration.
    `mirror`: where the scalars are shown too: "tensorboard", "wandb", "trackio", or a function of (step, values).
    `ranks`: where torch.distributed trains one model in several processes, all of which call this: "merged" records values of
    all of them together, "local" those of each process in a folder of its own, "one" those of this process, which alone
    calls it.
    `strict`: a failure inside the probe raises. Otherwise it is said once, and what it touched is missing.

    Raises RunError: a run or other files at `path`, a run to resume that is of another model or still being recorded, a
    model without recognisable layers or one that has already
    run compiled, a bad interval.
    """
    stages = stages_of(model)
    modules = [stage.module for stage in stages] or [model]
    meeting = meet(ranks, modules)
    with meeting or contextlib.nullcontext():
        vectors, matrices = schedule_of("every", every), schedule_of("matrices_every", matrices_every)
        for module in modules:
            judge_wrappers(module)
        each_sites = [
            find_sites(module, stack, layers, norms, staged=bool(stages), example=example)
            for module in modules
        ]
        sites = each_sites[0]
        following = None if tokens_every is None else schedule_of("tokens_every", tokens_every)
        if following is not None and not sites.has_reads:
            raise RunError(
                f"tokens_every follows depth weights, and this {type(sites.root).__name__} has none that can be seen: leave it out."
            )
        created = time.time()
        optimizers, found = _optimizers(optimizer)
        given, (path, upload) = path, _place(path, resume is not False, meeting)
        step = first_step(resume, optimizers, path)
        scale = LossScale(found if scaler is None else scaler)
        parts = [
            Part(sites, Masks(mask, sites), Parallel.of(module, sites.root, stage), stage)
            for module, sites, stage in zip(modules, each_sites, stages or [None], strict=True)
        ]
        for part in parts:
            prepare_compiler(part.sites.root)
        try:
            described = model_config(sites.called) | json.loads(
                json.dumps(dict(config or {}), allow_nan=False)
            )
        except (TypeError, ValueError) as error:
            raise RunError(
                f"config must hold plain JSON values (text, numbers, lists, dicts): {error}."
            ) from error
        tags = (tags,) if isinstance(tags, str) else tuple(map(str, tags))
        manifest = Manifest(
            sites.layout, created, vectors, matrices, described, tags, versions(sites.root), step=step
        )
        # Others show nothing; and what cannot be shown is refused before anything is written.
        shown = None if mirror is None or (meeting is not None and meeting.rank) else Mirror(mirror, path)
        # A bool is an int: step 0 is one to resume at, False is not.
        write = functools.partial(RunWriter, path, resume=resume is not False, upload=upload)
        where = str(path) if upload is None else upload.address.shown  # homes of machines differ
        writer, together = _begin(meeting, where, path, manifest, write, parts)
    faults = Faults(strict)
    seconds = seconds_before(path, step)
    if upload is not None and step:
        seconds = max(seconds, seconds_before(place_of(given), step))
    recorder = Recorder(
        parts,
        writer,
        manifest,
        optimizers,
        scale,
        faults,
        seconds,
        shown,
        together,
    )
    if following is not None:
        recorder._follow(following, decode)
    return recorder


def _place(path: str | os.PathLike, resume: bool, meeting: Meeting | None) -> "tuple[Path, Upload | None]":
    """The folder of this machine to record into, and what sends that on to a run that lives elsewhere. Raises RunError."""
    if ":/" not in os.fspath(path):
        return Path(path), None
    from probes.remote import on_this_machine
    from probes.remote.uploading import upload_for

    upload = upload_for(path)
    if upload is None:
        return on_this_machine(path), None
    if meeting is None or meeting.rank == 0:
        upload.prepare(resume)
    else:
        upload.spool.make()
    return upload.run, upload


def _begin(
    meeting: Meeting | None,
    where: str,
    path: Path,
    manifest: Manifest,
    write: Callable[..., RunWriter],
    parts: Sequence[Part],
) -> tuple[RunWriter, Together | None]:
    """The writer of this process, and what sums its values with those of others."""
    sites, parallel = parts[0].sites, parts[0].parallel
    if parallel is not None:
        alone = dataclasses.replace(manifest, ranks=Ranks(parallel.world, ONE, (), parallel.describe()))
    if meeting is None:
        return write(manifest if parallel is None else alone), None
    merged = tuple(name for name in METRICS if name not in OF_ONE) if meeting.values == MERGED else ()
    ranks = Ranks(meeting.world, meeting.values, merged, parallel.describe())
    manifest = dataclasses.replace(manifest, ranks=ranks)
    mine: list[RunWriter] = []

    def claim(stages: list[dict]) -> tuple[int, float]:
        of_all = dataclasses.replace(manifest, layout=whole(stages, sites).layout) if stages else manifest
        mine.append(write(of_all))
        return mine[0].attempt, mine[0].created

    schedules = [manifest.vectors.to_json(), manifest.matrices.to_json()]
    staged = [part for part in parts if part.stage is not None and meeting.values == MERGED]
    told = [told_of(part.sites, part.stage) for part in staged]
    agreed = meeting.begin(where, sites.layout, schedules, manifest.step, claim, told)
    if agreed is None:
        return write(alone), None
    if mine:
        writer = mine[0]
    else:
        own = manifest if agreed.values == LOCAL else None
        writer = write(manifest, place=join(path, agreed.attempt, agreed.rank, agreed.created, own))
    for part in parts:
        part.parallel.first = agreed.first
    return writer, None if agreed.group is None else Together(agreed, parts)


def _optimizers(
    given: Optimizers | None,
) -> tuple[list[torch.optim.Optimizer], torch.amp.GradScaler | None]:
    """Those that hooks are hung on, and the scaler that came with one of them."""
    optimizers = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    pairs = [unwrap_optimizer(each) for each in optimizers]
    optimizers = [optimizer for optimizer, _ in pairs]
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise RunError(
                f"A {type(optimizer).__name__} is not a torch.optim.Optimizer: leave `optimizer` out and call "
                "recorder.step() after each update."
            )
    return optimizers, next((scaler for _, scaler in pairs if scaler is not None), None)


def schedule_of(name: str, given: Steps) -> Schedule:
    """The schedule that `name=given` asks for. Raises RunError, in one sentence."""
    try:
        return schedule(given)
    except ValueError as error:
        raise RunError(f"{name} is {given!r}: {error}.") from None
