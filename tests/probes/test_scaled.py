"""Streams that are scaled on their way: what a layer adds is not what the stream has gained."""

import numpy as np
import pytest
import torch
from torch import nn

import probes
from tests.probes.models import sgd
from tests.probes.test_sites import Attention

WIDTH = 32  # four times as wide as there are sources, so that mixing is told


class Block(nn.Module):
    """A highway (Srivastava et al. 2015): h = t f(h) + (1 - t) h."""

    channels = WIDTH

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = (
            Attention(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)),
        )
        self.gate_1, self.gate_2 = (nn.Linear(WIDTH, self.channels) for _ in range(2))
        self.true, self.kept = [], []

    def note(self, added, kept):
        if isinstance(added, torch.Tensor):  # it is followed on symbols too
            self.true.append(float(added.detach().square().mean().sqrt()))
            self.kept.append(float(kept.detach().mean()))

    def add(self, x, gate, y):
        weight = torch.sigmoid(gate(x))
        self.note(weight * y, 1 - weight)
        return weight * y + (1 - weight) * x

    def forward(self, x):
        x = self.add(x, self.gate_1, self.attn(self.ln_1(x)))
        return self.add(x, self.gate_2, self.mlp(self.ln_2(x)))


class OneGate(Block):
    channels = 1


class Halved(Block):
    """Scaled when all is added."""

    def add(self, x, gate, y):
        self.note(gate.weight[0] * y, gate.weight)
        return x + gate.weight[0] * y

    def forward(self, x):
        return 0.5 * super().forward(x)


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.h = nn.ModuleList(block() for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("block", [Block, OneGate, Halved])
def test_what_a_gate_lets_through_is_what_is_added(block, tmp_path):
    torch.manual_seed(0)
    model = Model(block)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        for each in model.h:
            each.true, each.kept = [], []
        model(torch.arange(10).view(2, 5)).square().mean().backward()
        truth = [value for each in model.h for value in each.true]
        kept = [value for each in model.h for value in each.kept]
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run["output_rms"][0, 1:], truth, rtol=1e-5)
    weights = run["mixing_weight"][0]
    if block is OneGate:  # a weight for each token
        np.testing.assert_allclose(weights[1, :2], [kept[0], 1], rtol=1e-4)
    elif block is Block:
        assert np.isnan(weights[1]).all()  # one for each channel
    else:
        np.testing.assert_allclose(weights[4], [0.25, 0.25, 0.25, 0.5, 0.5], rtol=1e-4)
