"""Models that keep tokens first, [T, B, D]: every number is of the same token as its neighbours."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from tests.probes.foreign_families import WIDTH, Family
from tests.probes.models import sgd
from tests.probes.test_foreign import tokens


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).transpose(0, 1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))


class TurnedAfter(Family):
    """The embedding is looked up with tokens last."""

    def sublayer(self, index):
        return super().sublayer(index) if index % 2 else Attention()

    def embedded(self, idx):
        return self.embedding(idx).transpose(0, 1).contiguous()

    def forward(self, idx, attention_mask=None):
        return self.head(self.final_norm(self.stream(self.embedded(idx))))


class TurnedBefore(TurnedAfter):
    def embedded(self, idx):
        return self.embedding(idx.T)


class WithPositions(TurnedAfter):
    """No hook sees the embedding, but the two that it sums."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(64, WIDTH)

    def embedded(self, idx):
        return (self.embedding(idx) + self.positions(torch.arange(idx.shape[1]))).transpose(0, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model", [TurnedAfter, TurnedBefore, WithPositions])
def test_weights_mixing_and_single_tokens_are_the_models_own(model, masked, tmp_path, caplog):
    model, batch = model(), tokens(2, 10)
    mask = (torch.arange(10) < torch.tensor([[10], [6]])).long() if masked else torch.ones(2, 10).long()
    twin = copy.deepcopy(model)
    twin.own = []
    twin(batch)
    own = [weight.transpose(1, 2) for weight in twin.own]  # [S, B, T]
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, matrices_every=1, tokens_every=1):
        model(batch, attention_mask=mask).square().mean().backward()
        optimizer.step()
    assert not [message for message in caplog.messages if "mask" in message or "blank" in message]
    run = probes.open_run(tmp_path / "run")
    followed, keep = run.tokens(0).weight, mask != 0
    for row, weight in enumerate(own):
        mean = weight[:, keep].mean(1)
        np.testing.assert_allclose(run["depth_weight"][0, row, : len(weight)], mean, atol=1e-5)
        np.testing.assert_allclose(run["mixing_weight"][0, row, : len(weight)], mean, atol=1e-4)
        found = followed[:, :, row, : len(weight)]
        expected = weight.permute(1, 2, 0).where(keep.unsqueeze(-1), torch.nan)
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.nanmax(run["read_error"][0]) < 1e-5
    assert np.isfinite(run["output_grad_rms"][0]).all()
