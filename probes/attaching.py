"""Attach to a trainer that owns the loop: the one of Hugging Face or of Lightning. Needs neither to be installed.

Both call callbacks back. `Recordings` is what theirs have in common; each library has its own words for the rest.
"""

import functools
import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from probes.ending import describe
from probes.manifest import RunError
from probes.ranks import ONE
from probes.recorder import Recorder
from probes.recording import record
from probes.scalars import is_free

log = logging.getLogger("depthscope")


def attach(trainer: object, path: str | os.PathLike, **options) -> None:
    """Record each training of `trainer` at `path`, with the `options` of `probes.record`.

    `trainer` is a Trainer of Hugging Face transformers or of Lightning; call this before it trains. Model, optimizers
    and loss scaler are found when training begins, also under what the trainer wraps around them; what it logs is
    logged. A training that ends by itself is finished; an exception or Ctrl-C stops it. A second training of the same
    trainer goes to `path` followed by -2, and so on; one resumed from a checkpoint continues the run at `path`. Several
    processes record together, as `ranks` says.

    Raises RunError for anything else; when training begins, what `probes.record` raises.
    """
    libraries = {base.__module__.partition(".")[0] for base in type(trainer).__mro__}
    recordings = Recordings(Path(path), options)
    if "transformers" in libraries and hasattr(trainer, "add_callback"):
        _attach_to_hugging_face(trainer, recordings)
    elif found := libraries & {"lightning", "pytorch_lightning"}:
        _attach_to_lightning(trainer, recordings, found.pop())
    else:
        raise RunError(
            f"A {type(trainer).__name__} is not a Trainer of Hugging Face transformers or of Lightning: in a loop of "
            "your own, as with Accelerate, call probes.record(model, path, optimizer=optimizer)."
        )


class Recordings:
    """The recordings of one trainer: at most one at a time."""

    def __init__(self, path: Path, options: dict):
        self._path, self._options = path, options
        self._begun = 0
        self.recorder: Recorder | None = None

    def begin(
        self, model: nn.Module, optimizers: object, scaler: object, step: int, first: bool = True
    ) -> None:
        """A training begins with optimizer step `step`, in the `first` of several processes or in another."""
        self.stop("training began anew")
        if self._options.get("ranks") == ONE and not first:
            return
        options = {"scaler": scaler} | self._options
        path = self._path
        if step:
            options = {"resume": step} | options
        elif self._begun:
            path = path.with_name(f"{path.name}-{self._begun + 1}")
        self.recorder = record(model, path, optimizer=optimizers, **options)
        self._begun += not step or not self._begun

    def log(self, values: Mapping[str, object]) -> None:
        """Those of the values that are numbers, under names that are free."""
        if self.recorder is not None:
            self.recorder.log(**{name: v for name, v in values.items() if is_free(name) and _is_number(v)})

    def finish(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = None

    def stop(self, reason: str) -> None:
        if self.recorder is not None:
            self.recorder.close("stopped", reason)
        self.recorder = None


def _is_number(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float)


# Hugging Face


class _HuggingFace:
    # The learning rate and the norm of the gradients are recorded as they are at each recorded step.
    _NAMES = {"eval_loss": "val_loss", "num_input_tokens_seen": "tokens"}  # noqa: RUF012
    _OWN = ("grad_norm", "learning_rate")

    def __init__(self, recordings: Recordings, trainer):
        self._recordings, self._trainer = recordings, trainer

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        wrapped = getattr(self._trainer, "model_wrapped", None)
        model = wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else model
        self._recordings.begin(model, optimizer, None, state.global_step, state.is_world_process_zero)

    def on_log(self, args, state, control, *, logs, **_):
        self._recordings.log(
            {self._NAMES.get(name, name): value for name, value in logs.items() if name not in self._OWN}
        )


def _attach_to_hugging_face(trainer, recordings: Recordings) -> None:
    from transformers import TrainerCallback

    trainer.add_callback(type("DepthscopeCallback", (_HuggingFace, TrainerCallback), {})(recordings, trainer))
    train = trainer.train

    # No callback is told of an exception.
    @functools.wraps(train)
    def recorded(*args, **kwargs):
        try:
            done = train(*args, **kwargs)
        except BaseException as error:
            recordings.stop(describe(error))
            raise
        recordings.finish()
        return done

    trainer.train = recorded


# Lightning


class _Lightning:
    def __init__(self, recordings: Recordings):
        self._recordings = recordings
        self._seen: dict[str, torch.Tensor] = {}

    def on_sanity_check_start(self, trainer, module):
        # A compiled model must not run before it is recorded.
        self._begin(trainer, module)

    def on_train_start(self, trainer, module):
        if self._recordings.recorder is None:
            self._begin(trainer, module)

    def _begin(self, trainer, module) -> None:
        scaler = getattr(trainer.strategy.precision_plugin, "scaler", None)
        # Lightning counts the steps of each optimizer.
        step = trainer.global_step // max(len(trainer.optimizers), 1)
        wrapped = trainer.strategy.model
        module = wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else module
        self._recordings.begin(module, trainer.optimizers, scaler, step, trainer.is_global_zero)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if module.automatic_optimization and isinstance(loss, torch.Tensor):
            loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._recordings.log({"loss": loss} | self._new(trainer))

    def on_train_epoch_end(self, trainer, module):
        self._recordings.log(self._new(trainer))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self._recordings.log(self._new(trainer))

    def on_exception(self, trainer, module, exception):
        self._recordings.stop(describe(exception))

    def on_fit_end(self, trainer, module):
        self._recordings.finish()

    def _new(self, trainer) -> dict[str, object]:
        """What was logged since the last look. Lightning keeps the rest, in the memory where it was."""
        now = dict(trainer.callback_metrics)
        before, self._seen = self._seen, now
        return {
            name: value
            for name, value in now.items()
            if name not in before or before[name].data_ptr() != value.data_ptr()
        }


def _attach_to_lightning(trainer, recordings: Recordings, library: str) -> None:
    name = "lightning.pytorch" if library == "lightning" else library
    base = importlib.import_module(name).Callback
    trainer.callbacks.append(type("DepthscopeCallback", (_Lightning, base), {})(recordings))
