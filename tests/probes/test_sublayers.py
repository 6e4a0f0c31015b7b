"""Lists of sublayers without transformer blocks, and streams with skips."""

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.manifest import RunError
from tests.probes.models import batches
from tests.probes.recovering import WORDS, assert_recovers, recorded
from tests.probes.test_made import WIDTH, Mixer, rms_norm


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


class Sublayers(nn.Module):
    """Their sum is written in the model itself."""

    def __init__(self, count: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(mlp() if i % 2 else Mixer() for i in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(count))
        self.norm = nn.LayerNorm(WIDTH)
        self.skips = nn.Parameter(torch.tensor([0.6, 1.3]))

    def stream(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return x

    def forward(self, tokens):
        return self.head(self.norm(self.stream(self.words(tokens))))


class NormedByFunction(Sublayers):
    def stream(self, x):
        for layer in self.layers:
            x = x + layer(rms_norm(x))
        return x


class Skipping(Sublayers):
    """Skips between sublayers of one list."""

    def stream(self, x):
        kept = []
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if index > 1:
                x = x + self.skips[index - 2] * kept.pop()
            x = x + layer(norm(x))
            kept += [x] if index < 2 else []
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Mixer(), mlp()

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class UNet(Sublayers):
    """The second half of the blocks is given the states of the first, with weights."""

    def __init__(self):
        super().__init__(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def stream(self, x):
        kept = []
        for block in self.layers[:2]:
            x = block(x)
            kept.append(x)
        for index, block in enumerate(self.layers[2:]):
            x = block(x + self.skips[index] * kept.pop())
        return x


def test_a_list_of_sublayers_is_a_plain_residual(tmp_path):
    run = recorded(Sublayers(), tmp_path / "run", strict=True)
    assert_recovers(run, np.tri(5))
    assert [(layer.kind, layer.block, layer.name) for layer in run.layers] == [
        ("attention", 1, "layers.0"), ("mlp", 1, "layers.1"), ("attention", 2, "layers.2"), ("mlp", 2, "layers.3"),
    ]  # fmt: skip
    assert all(np.isfinite(run[name][0]).all() for name in ("hidden_rms", "output_grad_rms", "block_rms"))
    (tokens,) = batches(0, [(2, 7)])
    assert "identity     holds" in str(probes.describe(Sublayers(), tokens))


def test_states_before_norms_that_are_functions_are_summed(tmp_path):
    run = recorded(NormedByFunction(), tmp_path / "run", strict=True)
    assert_recovers(run, np.tri(5))
    assert all(
        np.isfinite(run[name][0]).all() for name in ("hidden_rms", "hidden_grad_rms", "output_grad_rms")
    )


def test_a_sum_that_is_not_followed_says_why():
    with pytest.raises(RunError, match="As for sublayers without blocks: what is done around layers was not"):
        probes.describe(Skipping())


def test_a_unet_of_blocks_shows_its_skips(tmp_path, caplog):
    model = UNet()
    near, far = model.skips.tolist()
    run = recorded(model, tmp_path / "run")
    middle, last = 1 + near, 1 + near + far
    rows = [[1] * n for n in range(1, 5)] + [
        [middle] * 5, [middle] * 5 + [1], [last] * 3 + [middle] * 2 + [1] * 2,
        [last] * 3 + [middle] * 2 + [1] * 3, [last] * 3 + [middle] * 2 + [1] * 4,
    ]  # fmt: skip
    assert_recovers(run, np.array([row + [0] * (9 - len(row)) for row in rows]))
    assert "the state into layer 5 (attention) of UNet is not the embedding plus" in caplog.text
