"""What the sample runs are: a model, its training and how densely it is recorded, for a CPU and for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

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


def plans(device: str) -> list[Plan]:
    """The runs of a kind of device: on a CPU the same ones, smaller."""
    gpu = device.startswith("cuda")
    return [
        *_decoders(gpu, device),
        _block_24(gpu, device),
        *_deep(gpu, device),
        *_kimi(gpu, device),
        _unhealthy(gpu, device),
    ]


def _decoders(gpu: bool, device: str) -> list[Plan]:
    if gpu:
        shape = {"width": 512, "blocks": 24, "heads": 8, "kv_heads": 4, "context": 512}
        training = TrainingConfig(
            steps=800, batch=32, context=512, lr=1e-3, warmup=80, device=device, dtype="bfloat16"
        )
        schedule, depth_block = Schedule(every=4, matrices_every=20, validate_every=40, tokens_every=300), 6
    else:
        shape = {"width": 128, "blocks": 12, "heads": 4, "kv_heads": 2, "context": 256}
        training = TrainingConfig(steps=400, batch=4, context=256)
        schedule, depth_block = Schedule(every=4, matrices_every=20, validate_every=20, tokens_every=150), 3
    kinds = {
        "prenorm": ("PreNorm", {"residual": "prenorm"}),
        "deepnorm": ("DeepNorm", {"residual": "deepnorm"}),
        "full": ("Full AttnRes", {"residual": "full"}),
        "block": (
            f"Block AttnRes, {depth_block} layers per depth block (8 depth blocks)",
            {"residual": "block", "layers_per_block": depth_block},
        ),
    }
    found = [
        Plan(
            name,
            says,
            lambda more=more: DecoderConfig(**shape, **more),
            training,
            schedule if more["residual"] in ("full", "block") else _without_tokens(schedule),
        )
        for name, (says, more) in kinds.items()
    ]
    coarse = {"residual": "block", "layers_per_block": 2 * depth_block}
    kill_at = training.steps // 4
    killed = Plan(
        "block-killed",
        f"Block AttnRes, {2 * depth_block} layers per depth block; the process was killed after step {kill_at}",
        lambda: DecoderConfig(**shape, **coarse),
        training,
        schedule,
        kill_at=kill_at,
    )
    return [*found, killed]


def _without_tokens(schedule: Schedule) -> Schedule:
    """For a baseline, which has no depth weights that a token could show."""
    return replace(schedule, tokens_every=None)


def _block_24(gpu: bool, device: str) -> Plan:
    """24 transformer blocks: what `depthscope attribute` is shown on."""
    if gpu:
        shape = {"width": 512, "blocks": 24, "heads": 8, "kv_heads": 4, "context": 512}
        training = TrainingConfig(
            steps=800, batch=32, context=512, lr=1e-3, warmup=80, device=device, dtype="bfloat16"
        )
        schedule = Schedule(every=4, matrices_every=40, validate_every=40, tokens_every=400)
    else:
        shape = {"width": 128, "blocks": 24, "heads": 4, "kv_heads": 2, "context": 128}
        training = TrainingConfig(steps=400, batch=8, context=128)
        schedule = Schedule(every=4, matrices_every=40, validate_every=40, tokens_every=200)
    return Plan(
        "block-24",
        "Block AttnRes, 24 transformer blocks, 6 layers per depth block (8 depth blocks)",
        lambda: DecoderConfig(**shape, residual="block", layers_per_block=6),
        training,
        schedule,
    )


def _deep(gpu: bool, device: str) -> list[Plan]:
    """100 layers."""
    if gpu:
        shape = {"width": 256, "blocks": 50, "heads": 4, "kv_heads": 2, "context": 512}
        training = TrainingConfig(
            steps=400, batch=16, context=512, lr=1e-3, warmup=60, device=device, dtype="bfloat16"
        )
        schedule = Schedule(every=4, matrices_every=40, validate_every=40, tokens_every=150)
    else:
        shape = {"width": 64, "blocks": 50, "heads": 2, "kv_heads": 1, "context": 128}
        training = TrainingConfig(steps=100, batch=2, context=128)
        schedule = Schedule(every=4, matrices_every=20, validate_every=40, tokens_every=40)
    block = {"residual": "block", "layers_per_block": 12}
    return [
        Plan(
            "deep-prenorm",
            "PreNorm, 100 layers",
            lambda: DecoderConfig(**shape, residual="prenorm"),
            training,
            _without_tokens(schedule),
        ),
        Plan(
            "deep-block",
            "Block AttnRes, 100 layers, 12 per depth block (9 depth blocks)",
            lambda: DecoderConfig(**shape, **block),
            training,
            schedule,
        ),
    ]


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
            _without_tokens(schedule),
        ),
        Plan(
            "kimi-block",
            "the same, converted to Block AttnRes, 2 layers per depth block",
            lambda: model(True),
            training,
            schedule,
        ),
    ]


def _unhealthy(gpu: bool, device: str) -> Plan:
    """A learning rate far too high, in float16 without a loss scale."""
    healthy = _decoders(gpu, device)[0]
    return Plan(
        "unhealthy",
        "PreNorm, learning rate 0.1, far too high, in float16 without a loss scale: spikes, then the first "
        "layer that is not finite",
        healthy.model,
        replace(healthy.training, steps=100, lr=0.1, dtype="float16"),
        Schedule(every=1, matrices_every=2, validate_every=40),
        tags=("sample", "unhealthy"),
    )
