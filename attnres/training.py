"""One decoder learning one corpus, a step at a time, so that several can take turns."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from attnres.checks import check_above, check_count, check_is, check_not_negative
from attnres.corpus import Corpus
from attnres.decoder import Decoder, DecoderConfig, parameter_groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. A field that cannot be raises ValueError, in one sentence that names it."""

    steps: int = 200
    """Length of the learning rate's schedule; steps after it run at its end."""
    batch: int = 8
    context: int = 256
    lr: float = 2e-3
    """The highest learning rate, reached after the warmup."""
    lr_end: float = 0.1
    """The last learning rate, as a share of the highest."""
    warmup: int = 20
    """Steps of linear warmup."""
    weight_decay: float = 0.1
    """For matrices only; see `parameter_groups`."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """The largest gradient norm."""
    seed: int = 0
    """Of the initial weights and of the batches."""
    validation_batches: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    """float32, or bfloat16 or float16 for autocast; parameters and optimizer stay float32. Without a loss scale, which
    this training has not, float16 overflows where others do not."""
    compile: bool = False

    def __post_init__(self):
        for name in ("steps", "batch", "context", "validation_batches"):
            check_count(name, getattr(self, name))
        for name in ("lr", "clip"):
            check_above(name, getattr(self, name))
        for name in ("warmup", "weight_decay", "lr_end"):
            check_not_negative(name, getattr(self, name))
        if not (_is_pair(self.betas) and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {self.betas!r}.")
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile must be True or False, not {self.compile!r}.")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, not {self.seed!r}.")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError):
            raise ValueError(
                f'device must be one that torch knows, such as "cpu" or "cuda", not {self.device!r}.'
            ) from None
        if self.dtype not in tuple(DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")


class Training:
    """A model, its optimizer and its batches; `step()` as often as you like.

    `model` and `optimizer` are there before the first step, for anything that wants to watch them. Trainings
    with one seed see the same batches, and start from the same shared weights whatever their residual.

    Instead of a decoder's configuration it takes a module of one's own, which is called with bytes [B, T] and gives
    logits [B, T, V], or an output that has them as `logits`.
    """

    def __init__(self, decoder: DecoderConfig | nn.Module, config: TrainingConfig, corpus: Corpus):
        for name, given, kind in (
            ("decoder", decoder, DecoderConfig | nn.Module),
            ("config", config, TrainingConfig),
            ("corpus", corpus, Corpus),
        ):
            check_is(name, given, kind)
        if isinstance(decoder, DecoderConfig):
            if config.context > decoder.context:
                raise ValueError(f"context is {config.context}, and the decoder's is only {decoder.context}.")
            if decoder.vocabulary < 256:
                raise ValueError(
                    f"vocabulary must be at least 256 to hold all bytes, not {decoder.vocabulary}."
                )
            decoder = _seeded_decoder(decoder, config.seed)
        # Asked for once now, so that a text that is too small is refused before anything is begun.
        corpus.train_batch(0, 1, config.context, config.seed)
        corpus.validation_batches(1, 1, config.context)
        self.config = config
        self.corpus = corpus
        self.steps_done = 0
        self.grad_norm: Tensor | None = None
        """Before clipping, of the latest step; a tensor on the device."""
        self.model = _on_device(decoder, config.device)
        if config.compile:
            # In place, so that `model` stays the decoder; hooks set before the first step are compiled too.
            self.model.compile()
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_share)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.scheduler.get_last_lr()[0]

    def step(self) -> Tensor:
        """One optimizer step; its loss before the step, in nats per byte, a scalar tensor on the device.

        Reads nothing back from the device. Gradients stay until the next step.
        """
        config = self.config
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(
            *self.corpus.train_batch(self.steps_done, config.batch, config.context, config.seed)
        )
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.steps_done += 1
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the fixed validation batches, in nats per byte."""
        config = self.config
        was_training = self.model.training
        self.model.eval()
        try:
            batches = self.corpus.validation_batches(config.validation_batches, config.batch, config.context)
            return torch.stack([self._loss(*pair) for pair in batches]).mean().item()
        finally:
            self.model.train(was_training)

    def save(self, path: str | Path) -> None:
        """The parameters as they are now, as safetensors that say after how many steps; whole or not there at all.

        Raises OSError where the disk refuses.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            name: x.detach().cpu().contiguous()
            for name, x in self.model.state_dict().items()
            if isinstance(x, Tensor)
        }
        shared = {}
        for name, x in state.items():  # a tied weight may not be in one file twice
            state[name] = x.clone() if x.data_ptr() in shared else x
            shared[x.data_ptr()] = name
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            save_file(state, temporary, {"step": str(self.steps_done)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs, targets = (x.to(self.config.device, non_blocking=True) for x in (inputs, targets))
        with self._autocast():
            output = self.model(inputs)
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _autocast(self) -> AbstractContextManager:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, DTYPES[self.config.dtype])

    def _lr_share(self, step: int) -> float:
        """Linear warmup, then half a cosine down to `lr_end`."""
        config = self.config
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
        return config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * done)) / 2


def _on_device(model: Decoder, device: str) -> Decoder:
    try:
        return model.to(device)
    # Without CUDA, torch asserts that it has it.
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}.") from error


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    )


def _seeded_decoder(decoder: DecoderConfig, seed: int) -> Decoder:
    """The same weights for the same seed, and the caller's random numbers left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Decoder(decoder)
