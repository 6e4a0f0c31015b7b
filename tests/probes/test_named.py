"""Layers that the user names: in the order in which they run, whatever the order in which modules are registered, and
never with a wrong mixing."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.declared import out_of_order
from tests.probes.models import sgd, train

WIDTH = 64


class Block(nn.Module):
    """Registers its MLP first, and runs it last."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.norm_2, self.norm_1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Scaled(Block):
    def forward(self, x):
        x = x + 0.3 * self.attn(self.norm_1(x))
        return 2 * x + self.mlp(self.norm_2(x))


class NormLast(Block):
    """The norm of the sum: no mix of what the sublayers return."""

    def forward(self, x):
        x = self.norm_1(x + self.attn(x))
        return self.norm_2(x + self.mlp(x))


class Model(nn.Module):
    """Registers its last norm first, as OPT does."""

    def __init__(self, block=Block):
        super().__init__()
        self.last, self.words = nn.LayerNorm(WIDTH), nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 17)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


class OnlyMine(Model):
    """Takes nothing but what its own data loader makes, so that nobody can try it."""

    def forward(self, tokens):
        if tokens.shape[0] < 3 and tokens.shape[1] == 8 and not self.__dict__.get("known"):
            raise ValueError("not my tokens")
        return super().forward(tokens)


LAYERS = ["blocks.*.attn", "blocks.*.mlp"]
NORMS = ["blocks.*.norm_1", "blocks.*.norm_2", "last"]


def recorded(model, path, layers=LAYERS, norms=NORMS):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, layers=layers, norms=norms):
        model.known = True
        train(model, optimizer, 1)
    return probes.open_run(path)


def weights(run) -> np.ndarray:
    return run["mixing_weight"][0][np.tri(5, dtype=bool)]


def test_layers_are_numbered_as_they_run(tmp_path, caplog):
    torch.manual_seed(0)
    run = recorded(Model(), tmp_path / "run")
    assert [layer.name for layer in run.layers] == [
        "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp",
    ]  # fmt: skip
    np.testing.assert_allclose(weights(run), 1, atol=1e-4)
    assert not caplog.messages


def test_their_coefficients_are_those_of_the_model(tmp_path):
    torch.manual_seed(0)
    run = recorded(Model(Scaled), tmp_path / "run")
    truth = [[1], [1, 0.3], [2, 0.6, 1], [2, 0.6, 1, 0.3], [4, 1.2, 2, 0.6, 1]]
    np.testing.assert_allclose(weights(run), np.concatenate(truth), atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "norms", "block"),
    [
        (["blocks.*.mlp"], ["blocks.*.norm_2", "last"], Block),  # attention adds too
        (LAYERS, ["blocks.*.attn", "blocks.*.mlp", "last"], NormLast),
    ],
)
def test_what_the_layers_do_not_explain_has_no_weights(layers, norms, block, tmp_path, caplog):
    torch.manual_seed(0)
    run = recorded(Model(block), tmp_path / "run", layers, norms)
    if "mixing_weight" in run.metrics:
        assert np.isnan(run["mixing_weight"][0, 1:]).all()
    assert (run["mixing_r2"][0, 1:] < 0.999).all()
    np.testing.assert_allclose(np.nansum(run["mixing_share"][0], 1), run["mixing_r2"][0], atol=1e-4)
    assert any("so their mixing_weight is blank" in message for message in caplog.messages)


def test_layers_that_are_found_say_it_quietly(tmp_path, caplog):
    caplog.set_level(logging.INFO, "depthscope")
    torch.manual_seed(0)
    run = recorded(Model(NormLast), tmp_path / "run", None, None)
    assert np.isnan(run["mixing_weight"][0, 1:]).all()
    (record,) = [each for each in caplog.records if "mixing_weight is blank" in each.getMessage()]
    assert record.levelname == "INFO"


@pytest.mark.parametrize(
    ("norms", "told"),
    [
        (["blocks.0.norm_2", "blocks.1.*norm*", "blocks.1.mlp.0", "last"], "'blocks.0.norm_2' should receive the state of the layer 'blocks.0.attn'"),
        (["blocks.*.norm_1", "blocks.*.norm_2", "blocks.0"], "'blocks.1.norm_2' should receive the final state"),
    ],
)  # fmt: skip
def test_norms_that_come_too_late_are_refused(norms, told, tmp_path):
    with pytest.raises(probes.RunError, match=told) as caught:
        recorded(Model(), tmp_path / "run", norms=norms)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_what_nobody_can_try_is_watched(tmp_path, caplog):
    """The registered order is wrong, and nothing told so before training."""
    torch.manual_seed(0)
    run = recorded(OnlyMine(), tmp_path / "run")
    assert "mixing_weight" not in run.metrics
    assert any("does not run in that order" in message for message in caplog.messages)


def test_a_trial_leaves_nothing_behind():
    model = Model().eval()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    probes.describe(model, layers=LAYERS, norms=NORMS)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random) and not any(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_which_order_is_possible():
    nan = float("nan")
    assert out_of_order([0, 2, 4], [1, 3]) is None
    assert out_of_order([0, 1, 4], [2, 3]) is None  # side by side
    assert out_of_order([0, nan, 4], [1, nan]) is None
    assert out_of_order([2, 3, 4], [1, 5]) == 0
    assert out_of_order([0, 2, 3], [1, 4]) == 2
    assert out_of_order([0, 1, 9], [4, 3]) == 0
