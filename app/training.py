"""Train and record: where the reference models, the probes and the command line meet. Needs torch."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import attnres
import probes

if not getattr(attnres, "__depthscope__", False):
    raise ImportError(
        f"The package attnres at {Path(attnres.__file__).parent} is not depthscope's: another package of that name "
        "(fast-attnres installs one) is in the way. Use an environment without it."
    )

from attnres import Corpus, Decoder, DecoderConfig, Training, TrainingConfig

NAMES = {"prenorm": "PreNorm", "full": "Full AttnRes", "block": "Block AttnRes"}


@dataclass(frozen=True)
class Schedule:
    """How often a training is recorded and validated, in steps."""

    every: int = 1
    matrices_every: int = 5
    validate_every: int = 25


class RecordedTraining:
    """One training with probes attached; `step()` trains and logs. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        decoder: DecoderConfig,
        config: TrainingConfig,
        corpus: Corpus,
        schedule: Schedule,
        tags: Sequence[str] = (),
    ):
        self.path, self.name = path, NAMES[decoder.residual]
        self.training = Training(decoder, config, corpus)
        self.schedule = schedule
        described = {"training": asdict(config), "corpus": corpus.describe()}
        self.recorder = probes.record(
            self.training.model,
            path,
            optimizer=self.training.optimizer,
            every=schedule.every,
            matrices_every=schedule.matrices_every,
            config=described,
            tags=tags,
        )

    def __enter__(self) -> "RecordedTraining":
        self.recorder.__enter__()
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
        if validation is not None:
            self.recorder.log(val_loss=validation)
        elif self.done:
            # Of the model after the last step, one step later than the step it is logged for.
            self.recorder.log(val_loss=self.training.validate())
        return loss


def in_turn(trainings: Sequence[RecordedTraining], show: bool = True) -> None:
    """Train all, a step of each in turn, so that they can be compared from the first seconds."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        for training in trainings:
            stack.enter_context(training)
        bars = [stack.enter_context(bar) for bar in _bars(trainings, show)]
        while not all(training.done for training in trainings):
            for training, bar in zip(trainings, bars, strict=True):
                if training.done:
                    continue
                loss = training.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()


def _bars(trainings: Sequence[RecordedTraining], show: bool) -> Iterator[tqdm]:
    width = max(len(training.name) for training in trainings)
    for position, training in enumerate(trainings):
        yield tqdm(
            total=training.training.config.steps,
            desc=training.name.ljust(width),
            unit="step",
            position=position,
            disable=not show,
            # Into a file a bar is a line now and then.
            mininterval=0.5 if sys.stderr.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| step {n_fmt}/{total_fmt}, {postfix}, {remaining} left",
        )
