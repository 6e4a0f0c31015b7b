"""Train and record: where the reference models, the probes and the command line meet. Needs torch."""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import attnres
import probes

if not getattr(attnres, "__depthscope__", False):
    raise ImportError(
        f"The package attnres at {Path(attnres.__file__).parent} is not depthscope's: another package of that name "
        "(fast-attnres installs one) is in the way. Use an environment without it."
    )

from app.checkpoints import checkpoint_path
from attnres import Corpus, DecoderConfig, Training, TrainingConfig

NAMES = {"prenorm": "PreNorm", "full": "Full AttnRes", "block": "Block AttnRes"}


@dataclass(frozen=True)
class Schedule:
    """How often a training is recorded and validated, in steps."""

    every: int = 1
    matrices_every: int = 5
    validate_every: int = 25
    tokens_every: int | None = None
    """Token snapshots, of models that read over depth alone."""
    checkpoint_every: int | None = None
    """The model's parameters are saved into the run after so many steps, and at the end; None: never."""


class RecordedTraining:
    """One training with probes attached; `step()` trains and logs. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        decoder: DecoderConfig | nn.Module,
        config: TrainingConfig,
        corpus: Corpus,
        schedule: Schedule,
        tags: Sequence[str] = (),
    ):
        self.path, self.name = path, NAMES.get(getattr(decoder, "residual", None), path.name)
        self.training = Training(decoder, config, corpus)
        self.schedule, self.tags = schedule, tags
        self.described = {"training": asdict(config), "corpus": corpus.describe()}

    def __enter__(self) -> "RecordedTraining":
        # Only here, so that a run which is begun is also closed.
        self.recorder = probes.record(
            self.training.model,
            self.path,
            optimizer=self.training.optimizer,
            every=self.schedule.every,
            matrices_every=self.schedule.matrices_every,
            tokens_every=self.schedule.tokens_every,
            decode=_text,
            config=self.described,
            tags=self.tags,
        )
        return self

    def __exit__(self, *error) -> None:
        self.recorder.__exit__(*error)

    @property
    def done(self) -> bool:
        return self.training.steps_done >= self.training.config.steps

    def step(self) -> torch.Tensor:
        """One optimizer step, its loss logged; the validation loss where it is due, before the step and at the end."""
        config = self.training.config
        due = self.training.steps_done % self.schedule.validate_every == 0
        validation = self.training.validate() if due else None
        loss = self.training.step()
        tokens = self.training.steps_done * config.batch * config.context
        self.recorder.log(loss=loss, tokens=tokens)
        every, done = self.schedule.checkpoint_every, self.training.steps_done
        if every and (done % every == 0 or self.done):
            self.training.save(checkpoint_path(self.path, done))
        if validation is not None:
            self.recorder.log(val_loss=validation)
        elif self.done:
            # Of the model after the last step, one step later than the step it is logged for.
            self.recorder.log(val_loss=self.training.validate())
        return loss


def _text(tokens: Sequence[int]) -> str:
    """The text of bytes: the corpora here are learned byte by byte."""
    return bytes(tokens).decode(errors="replace")


def in_turn(trainings: Sequence[RecordedTraining]) -> None:
    """Train all, a step of each in turn, so that they can be compared from the first seconds."""
    with ExitStack() as stack:
        for training in trainings:
            stack.enter_context(training)
        progress = stack.enter_context(_Bars(trainings) if sys.stderr.isatty() else _Lines(trainings))
        while not all(training.done for training in trainings):
            for position, training in enumerate(trainings):
                if not training.done:
                    progress.show(position, training.step().item())


class _Bars:
    """A progress bar for each training: loss and time left."""

    def __init__(self, trainings: Sequence[RecordedTraining]):
        width = max(len(training.name) for training in trainings)
        form = "{desc} {percentage:3.0f}%|{bar:24}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left"
        self._bars = [
            tqdm(
                total=training.training.config.steps,
                desc=training.name.ljust(width),
                position=position,
                bar_format=form,
            )
            for position, training in enumerate(trainings)
        ]

    def show(self, position: int, loss: float) -> None:
        self._bars[position].set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bars[position].update()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error) -> None:
        for bar in self._bars:
            bar.close()


class _Lines:
    """Where no terminal can draw bars: a line every fifteen seconds, and one at the end."""

    def __init__(self, trainings: Sequence[RecordedTraining]):
        self._trainings = trainings
        self._losses = [math.nan] * len(trainings)
        self._begun = self._told = time.monotonic()

    def show(self, position: int, loss: float) -> None:
        self._losses[position] = loss
        if time.monotonic() - self._told >= 15:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        done = sum(training.training.steps_done for training in self._trainings)
        total = sum(training.training.config.steps for training in self._trainings)
        left = f", about {(self._told - self._begun) / done * (total - done):.0f} s left" if done else ""
        known = [(t.name, x) for t, x in zip(self._trainings, self._losses, strict=True) if not math.isnan(x)]
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in known) or "none yet"
        print(f"{done / total:4.0%}  loss: {losses}{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error) -> None:
        self._tell()
