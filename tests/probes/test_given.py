"""What layers are given and what they add, in AttnRes code that does it otherwise than most: against the model's own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.probes.test_foreign import TOLERANCE, recorded, tokens

WIDTH, LAYERS = 32, 6


class Reading(nn.Module):
    """Sublayers that read blocks of `size` layers, the first with the embedding in it; `seen` keeps the weights, states
    and outputs of its last forward."""

    size, bias, tokens_first = 3, False, False

    def __init__(self, context=64):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(50, WIDTH)
        self.queries = nn.Parameter(torch.randn(LAYERS + 1, WIDTH))
        self.biases = nn.Parameter(torch.randn(LAYERS, WIDTH))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS + 1))
        self.seen = [], [], []

    def read(self, sources, index):
        values = torch.stack(sources)
        keys = F.rms_norm(values, (WIDTH,))
        weight = (keys @ self.queries[index]).softmax(0)
        return weight, (weight.unsqueeze(-1) * values).sum(0)

    def made(self, x, index):
        x = self.layers[index](x)
        return x + self.biases[index] if self.bias else x

    def forward(self, ids, targets=None):
        assert ids.shape[1] <= self.context
        weights, states, outputs = self.seen = [], [], []
        x = self.embed(ids).transpose(0, 1).contiguous() if self.tokens_first else self.embed(ids)
        blocks, partial = [], x
        for index in range(LAYERS + 1):
            if index % self.size == 0 and index:
                blocks, partial = [*blocks, partial], None
            sources = blocks if partial is None else [*blocks, partial]
            weight, state = self.read(sources, index)
            weights.append(weight.detach())
            states.append(state.detach())
            if index == LAYERS:
                made = self.norms[index](state)
                return made, (made * made.roll(1, -1)).mean()
            output = self.made(self.norms[index](state), index)
            outputs.append(output.detach())
            partial = output if partial is None else partial + output


class ByKernel(Reading):
    """Attention over depth, so that the first read gives back its one source whatever the query."""

    size = 1

    def read(self, sources, index):
        values = torch.stack(sources, 2)
        keys = F.rms_norm(values, (WIDTH,)) * 3
        weight = (keys @ self.queries[index] / WIDTH**0.5).softmax(-1).movedim(-1, 0)
        shape = values.shape
        query = self.queries[index].expand(shape[0] * shape[1], 1, 1, WIDTH)
        keys, values = (each.reshape(-1, 1, shape[2], WIDTH) for each in (keys, values))
        return weight, F.scaled_dot_product_attention(query, keys, values).reshape(*shape[:2], WIDTH)


class Unread(Reading):
    """Where there is one source, it is received as it is."""

    def read(self, sources, index):
        if len(sources) == 1:
            return torch.ones_like(sources[0][..., 0])[None], sources[0]
        return super().read(sources, index)


class Biased(Reading):
    size, bias = 1, True

    def __init__(self):
        super().__init__()
        self.same = nn.ModuleList(nn.Identity() for _ in range(LAYERS))

    def made(self, x, index):
        return self.same[index](super().made(x, index))


class Turned(Reading):
    size, tokens_first = 1, True


class Short(Reading):
    size = 1

    def __init__(self):
        super().__init__(context=6)


@pytest.mark.parametrize("kind", [Reading, ByKernel, Unread, Biased, Turned, Short])
def test_weights_states_and_outputs_are_the_models_own(kind, tmp_path):
    torch.manual_seed(0)
    model, batch = kind(), tokens(3, 6)
    twin = copy.deepcopy(model)
    twin(batch)
    run = recorded(model, tmp_path / "run", batch)
    weights, states, outputs = twin.seen
    own = dict(enumerate(weights))
    for row, read in zip(run["depth_weight"][0], run.reads, strict=True):
        weight = own.pop(LAYERS if read.layer is None else read.layer - 1)
        np.testing.assert_allclose(row[: len(weight)], weight.flatten(1).mean(1), atol=TOLERANCE)
    assert all(len(weight) == 1 for weight in own.values())  # of what is received as it is no row is needed
    rms = [[float(x.square().mean().sqrt()) for x in each] for each in (states, outputs)]
    np.testing.assert_allclose(run["hidden_rms"][0], rms[0], rtol=1e-4)
    np.testing.assert_allclose(run["output_rms"][0][1:], rms[1], rtol=1e-4)
