"""A transformer block for tests, and models that are stacks of such; what a conversion changes in them."""

import torch
from torch import nn

import attnres
from tests.attnres.families import logits_of

WIDTH = 8


class Block(nn.Module):
    """A transformer block without attention; subclasses say how its parts are put together."""

    def __init__(self):
        super().__init__()
        self.norm1, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + self.second(self.norm2(x))


class Stack(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Holding(nn.Module):
    """Runs its parts one after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def example():
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def stack(*kinds):
    torch.manual_seed(0)
    return Stack(*kinds)


def negligible_eps(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-12
    return model


def sharing(*names):
    """Three blocks that share these parts."""
    model = stack(Block, Block, Block)
    for block in model.blocks[1:]:
        for name in names:
            setattr(block, name, getattr(model.blocks[0], name))
    return model


def zero_query_deviation(model, inputs, size):
    model.eval()
    before = logits_of(model(**inputs))
    attnres.convert(model, "block", size, example=inputs, eps=1e-12)
    return ((logits_of(model(**inputs)) - before).norm() / before.norm()).item()
