"""What the sample runs are: a model, its training and how densely it is recorded, for a CPU and for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

import attnres
from app.training import DecoderConfig, Schedule, TrainingConfig


@dataclass(frozen=True)
class Plan:
    """One run. `model` makes a decoder's configuration or a module; `kill_at` is the step after which the process is
    killed, as it happens at night."""

    name: str
    says: str
    model: Callable[[], DecoderConfig | nn.Module]
    training: TrainingConfig
    schedule: Schedule
    tags: tuple[str, ...] = field(default=("sample",))
    kill_at: int | None = None


@dataclass(frozen=True)
class Size:
    """How large the decoders of a group are, how long they train and how densely they are recorded."""

    shape: dict
    training: TrainingConfig
    schedule: Schedule

    def run(self, name: str, says: str, kill_at: int | None = None, **residual) -> Plan:
        """A decoder of this size with that residual. A baseline has no depth weights that a token could show."""
        reads = residual["residual"] in ("full", "block")
        schedule = self.schedule if reads else replace(self.schedule, tokens_every=None)
        model = partial(DecoderConfig, **self.shape, **residual)
        return Plan(name, says, model, self.training, schedule, kill_at=kill_at)


def plans(device: str) -> list[Plan]:
    """The runs of a kind of device. A CPU has smaller ones, and a pair of 24 transformer blocks besides, for a GPU's
    decoders have as many anyway: `full` and `block` are what attribution is shown on there."""
    gpu = device.startswith("cuda")
    size = _wide(device) if gpu else _small()
    by = 6 if gpu else 3
    prenorm = size.run("prenorm", "PreNorm", residual="prenorm")
    return [
        prenorm,
        size.run("full", "Full AttnRes", residual="full"),
        size.run("block", _block(by, 8), residual="block", layers_per_block=by),
        size.run("deepnorm", "DeepNorm", residual="deepnorm"),
        *([] if gpu else _pair("{}-24", "24 transformer blocks", _small_24(), 6, 8)),
        *_pair("deep-{}", "100 layers", _deep(device) if gpu else _small_deep(), 12, 9),
        _unhealthy(prenorm),
        _killed(size, 2 * by),
        *_kimi(gpu, device),
    ]


def _wide(device: str) -> Size:
    """70 million parameters, and 9.8 million bytes of text; benchmarks/expected.py tells how long that takes."""
    training = TrainingConfig(
        steps=600, batch=32, context=512, lr=1e-3, warmup=80, device=device, dtype="bfloat16"
    )
    return Size(
        {"width": 512, "blocks": 24, "heads": 8, "kv_heads": 4, "context": 512},
        training,
        Schedule(every=4, matrices_every=20, validate_every=40, tokens_every=225),
    )


def _small() -> Size:
    return Size(
        {"width": 128, "blocks": 12, "heads": 4, "kv_heads": 2, "context": 256},
        TrainingConfig(steps=400, batch=4, context=256),
        Schedule(every=4, matrices_every=20, validate_every=20, tokens_every=150),
    )


def _small_24() -> Size:
    return Size(
        {"width": 128, "blocks": 24, "heads": 4, "kv_heads": 2, "context": 128},
        TrainingConfig(steps=400, batch=8, context=128),
        Schedule(every=4, matrices_every=40, validate_every=40, tokens_every=200),
    )


def _deep(device: str) -> Size:
    training = TrainingConfig(
        steps=400, batch=16, context=512, lr=1e-3, warmup=60, device=device, dtype="bfloat16"
    )
    return Size(
        {"width": 256, "blocks": 50, "heads": 4, "kv_heads": 2, "context": 512},
        training,
        Schedule(every=4, matrices_every=40, validate_every=40, tokens_every=150),
    )


def _small_deep() -> Size:
    return Size(
        {"width": 64, "blocks": 50, "heads": 2, "kv_heads": 1, "context": 128},
        TrainingConfig(steps=100, batch=2, context=128),
        Schedule(every=4, matrices_every=20, validate_every=40, tokens_every=40),
    )


def _block(by: int, depth_blocks: int) -> str:
    return f"Block AttnRes, {by} layers per depth block ({depth_blocks} depth blocks)"


def _pair(name: str, depth: str, size: Size, by: int, depth_blocks: int) -> list[Plan]:
    """PreNorm and Block, alike but for the residual."""
    block = {"residual": "block", "layers_per_block": by}
    return [
        size.run(name.format("prenorm"), f"PreNorm, {depth}", residual="prenorm"),
        size.run(name.format("block"), f"{_block(by, depth_blocks)}, {depth}", **block),
    ]


def _killed(size: Size, by: int) -> Plan:
    kill_at = size.training.steps // 4
    says = f"Block AttnRes, {by} layers per depth block; the process was killed after step {kill_at}"
    return size.run("block-killed", says, kill_at, residual="block", layers_per_block=by)


def _unhealthy(healthy: Plan) -> Plan:
    """A learning rate far too high, in float16 without a loss scale."""
    return Plan(
        "unhealthy",
        "PreNorm, learning rate 0.1, far too high, in float16 without a loss scale: spikes, then the first "
        "layer that is not finite",
        healthy.model,
        replace(healthy.training, steps=100, lr=0.1, dtype="float16"),
        Schedule(every=1, matrices_every=2, validate_every=40),
        tags=("sample", "unhealthy"),
    )


def _kimi(gpu: bool, device: str) -> list[Plan]:
    """transformers' Kimi Linear (delta and latent attention, mixture of experts) as it is, and converted."""
    blocks, width = (12, 256) if gpu else (6, 64)
    if gpu:
        training = TrainingConfig(
            steps=300, batch=8, context=256, lr=1e-3, warmup=40, device=device, dtype="bfloat16"
        )
    else:
        training = TrainingConfig(steps=120, batch=2, context=64)
    schedule = Schedule(every=4, matrices_every=20, validate_every=40, tokens_every=training.steps * 2 // 5)

    def model(convert: bool) -> nn.Module:
        from transformers import KimiLinearConfig, KimiLinearForCausalLM

        config = KimiLinearConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
            max_position_embeddings=training.context,
            layer_types=[("full" if i % 4 == 3 else "linear") + "_attention" for i in range(blocks)],
            linear_head_dim=width // 4,
            linear_num_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=width,
            kv_lora_rank=width // 2,
            qk_rope_head_dim=width // 8,
            qk_nope_head_dim=width // 8,
            v_head_dim=width // 4,
            experts_implementation="eager",
            pad_token_id=None,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(training.seed)
            made = KimiLinearForCausalLM(config)
        return attnres.convert(made, residual="block", layers_per_block=2) if convert else made

    return [
        Plan(
            "kimi-prenorm",
            f"Kimi Linear, {blocks} transformer blocks, as it is",
            lambda: model(False),
            training,
            replace(schedule, tokens_every=None),
        ),
        Plan(
            "kimi-block",
            "the same, converted to Block AttnRes, 2 layers per depth block",
            lambda: model(True),
            training,
            schedule,
        ),
    ]
