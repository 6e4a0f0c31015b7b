"""Small models to record, and steps to train them with."""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import probes
from attnres import Decoder
from probes import manifest
from tests.attnres.models import RESIDUALS, lively_decoder

torch.set_num_threads(1)

_PLAIN = ("prenorm", "full", "block of 1", "block of 2", "block of 4, ragged")
KINDS = {name: RESIDUALS[name] for name in _PLAIN} | {
    "block of 3": {"residual": "block", "layers_per_block": 3}
}


def decoder(kind: str = "full", **changes) -> Decoder:
    """float32, six layers 16 wide unless told otherwise, every parameter random, queries too."""
    model = lively_decoder(**KINDS[kind], **changes).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # milder, so that float32 stays close to float64
                parameter.mul_(0.5)
    return model


def batches(step: int, sizes=((2, 8), (1, 5), (3, 7)), vocabulary: int = 17) -> list[Tensor]:
    """The micro-batches of one step, of unequal size."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(vocabulary, size, generator=generator) for size in sizes]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0, after=None) -> None:
    """`steps` steps of one micro-batch; `after(loss)` runs after each backward pass."""
    for step in range(start, start + steps):
        (tokens,) = batches(step, [(2, 8)])
        optimizer.zero_grad()
        loss = loss_of(model(tokens), tokens)
        loss.backward()
        if after is not None:
            after(loss)
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def hooks_on(model: nn.Module) -> int:
    """Every hook on a model's modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    tensors = [p._post_accumulate_grad_hooks for p in model.parameters()] + [
        p._backward_hooks for p in model.parameters()
    ]
    return modules + sum(len(hooks or ()) for hooks in tensors)


def recorded(path, steps: int = 3, **options):
    """A finished run of a small model."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **{"every": 1, "matrices_every": 2} | options):
        train(model, optimizer, steps)
    return probes.open_run(path)


def shards(path):
    return sorted((path / manifest.RANK_FOLDER).glob("*.safetensors"))


def wait_for(condition, seconds: float = 20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)
