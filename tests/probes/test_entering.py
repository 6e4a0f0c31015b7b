"""Source 0 is the embedding, also where the first block scales it before its first layer reads it."""

import numpy as np
import torch
from torch import nn

import probes
from tests.probes.models import sgd
from tests.probes.test_sites import GPTBlock

WIDTH = 32  # four times as wide as there are sources, so that mixing is told


class Block(GPTBlock):
    """The embedding comes in again at every block, with weights that are learned, as in modded-nanogpt."""

    def __init__(self):
        super().__init__(WIDTH)
        self.lambdas = nn.Parameter(torch.tensor([0.6, 0.3]))

    def forward(self, x, x0=None):
        return super().forward(self.lambdas[0] * x + self.lambdas[1] * x0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens):
        x = self.first = self.words(tokens)
        self.first.retain_grad()
        for block in self.h:
            x = block(x, self.first)
        return self.head(self.ln_f(x))


def test_an_embedding_that_comes_in_again(tmp_path):
    torch.manual_seed(0)
    model = Model()
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        model(torch.arange(10).view(2, 5)).square().mean().backward()
        truth = [float(x.detach().square().mean().sqrt()) for x in (model.first, model.first.grad)]
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(
        [run[f"output_{name}"][0, 0] for name in ("rms", "grad_rms")], truth, rtol=1e-5
    )
    np.testing.assert_allclose(run["mixing_weight"][0, 2, :3], [0.9 * 0.6 + 0.3, 0.6, 0.6], rtol=1e-4)
