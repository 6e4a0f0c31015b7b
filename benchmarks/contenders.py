"""Ways to watch a training step: each makes a model of its own, and a step that is watched."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import probes
from attnres import Decoder, DecoderConfig

NEVER = range(1)  # step 0 alone


def decoder(residual: str, options: argparse.Namespace) -> Decoder:
    torch.manual_seed(0)
    more = {"layers_per_block": 4} if residual == "block" else {}
    more |= {"heads": options.heads, "kv_heads": max(1, options.heads // 2)}
    config = DecoderConfig(
        width=options.width, blocks=options.blocks, context=options.context, residual=residual, **more
    )
    return Decoder(config).to(options.device, getattr(torch, options.dtype))


def tokens_for(options: argparse.Namespace) -> Tensor:
    return torch.randint(256, (options.batch, options.context), device=options.device)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def compiled(model: nn.Module, mode: str, whole: bool = True) -> nn.Module:
    """`whole` asks for one graph, which hooks that read numbers back do not leave."""
    if mode == "eager":
        return model
    return torch.compile(
        model, fullgraph=whole, dynamic=False, mode="reduce-overhead" if mode == "reduce-overhead" else None
    )


def stepper(run: nn.Module, optimizer, options: argparse.Namespace, after: Callable = lambda loss: None):
    """A training step; `after(loss)` is what a contender does between the backward pass and the update."""
    tokens = tokens_for(options)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(run(tokens), tokens)
        loss.backward()
        after(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


@contextlib.contextmanager
def nothing(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    model = decoder("prenorm", options)
    yield stepper(compiled(model, mode), adamw(model), options)


@contextlib.contextmanager
def ours(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """Vectors at every step."""
    model = decoder("prenorm", options)
    optimizer = adamw(model)
    with probes.record(model, folder / "run", optimizer=optimizer, every=1, matrices_every=NEVER):
        yield stepper(compiled(model, mode), optimizer, options)


@contextlib.contextmanager
def item_hooks(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """The same numbers by hooks that read each one back, as they are commonly written."""
    model = decoder("prenorm", options)
    seen: dict[str, float] = {}

    def watch(name: str, x: Tensor) -> None:
        seen[name] = x.float().pow(2).mean().sqrt().item()

    def hook(name: str):
        def after(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            for place, tensor in (("state", args[0]), ("output", x)):
                watch(f"{name} {place}", tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda g, place=place: watch(f"{name} {place} gradient", g))

        return after

    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            module.register_forward_hook(hook(name))

    def norms(loss: Tensor) -> None:
        for name, p in model.named_parameters():
            seen[name] = p.grad.norm().item()

    yield stepper(compiled(model, mode, whole=False), adamw(model), options, norms)
    if len(seen) < 4 * 2 * options.blocks:
        raise RuntimeError(f"the hooks saw {len(seen)} numbers only")


@contextlib.contextmanager
def wandb_watch(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """wandb.watch(log="all", log_freq=1), offline."""
    import wandb

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    model = decoder("prenorm", options)
    with wandb.init(project="overhead", mode="offline", dir=str(folder)) as run:
        run.watch(model, log="all", log_freq=1)
        yield stepper(
            compiled(model, mode, whole=False),
            adamw(model),
            options,
            lambda loss: run.log({"loss": loss.item()}),
        )


@contextlib.contextmanager
def torchinstruments(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """An observer that samples every forward."""
    from torchinstruments import inject_observer, remove_observer
    from torchinstruments.sampling import AlwaysSampler

    model = decoder("prenorm", options)
    inject_observer(model, sampler=AlwaysSampler(), output_dir=folder / "stats")
    try:
        yield stepper(compiled(model, mode, whole=False), adamw(model), options)
    finally:
        remove_observer(model)


WAYS = {
    "depthscope": ("depthscope, vectors at every step", ours),
    "item": ("hooks with .item()", item_hooks),
    "wandb": ('wandb.watch(log="all", log_freq=1)', wandb_watch),
    "torchinstruments": ("TorchInstruments, every forward", torchinstruments),
}
OWN = (nothing, ours)
