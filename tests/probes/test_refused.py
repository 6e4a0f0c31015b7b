"""Models that have run compiled: refused with the reason, and only those."""

import pytest
import torch
from torch import nn

import probes
from tests.probes.models import hooks_on, sgd
from tests.probes.test_checkpointing import Stack

TOKENS = torch.arange(6)[None]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model):
    model.compile(backend="aot_eager")
    return model


def blocks(model):
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


WAYS = {
    "module.compile": whole,
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager"),
    "each block": blocks,
    "one block": lambda model: model.blocks[1].compile(backend="aot_eager") or model,
}


def train(model, optimizer):
    optimizer.zero_grad()
    model(TOKENS).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_has_run_compiled_is_refused(way, tmp_path):
    model = Stack(blocks=2)
    compiled = WAYS[way](model)
    train(compiled, sgd(model))
    with pytest.raises(
        probes.RunError, match=r"Stack has already run compiled \(seen at .*torch\.compiler\.reset"
    ):
        probes.record(compiled, tmp_path / "run")
    with pytest.raises(probes.RunError, match="has already run compiled"):
        probes.record(model, tmp_path / "run")
    assert hooks_on(model) == 0 and not (tmp_path / "run").exists()


def test_after_a_reset_it_is_recorded(tmp_path):
    model = whole(Stack(blocks=2))
    optimizer = sgd(model)
    train(model, optimizer)
    torch.compiler.reset()
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer)
    assert probes.open_run(tmp_path / "run").steps("hidden_grad_rms").tolist() == [0]


@pytest.mark.parametrize("way", ["module.compile", pytest.param("torch.compile", marks=pytest.mark.long)])
def test_a_fresh_model_of_the_same_class_is_seen(way, tmp_path, caplog):
    """torch.compile would use the code of the first one again, which has no probes."""
    first = Stack(blocks=2)
    compiled = WAYS[way](first)
    optimizer = sgd(first)
    train(compiled, optimizer)
    model = Stack(blocks=2)
    recorded, steps = WAYS[way](model), sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=steps, every=1):
        train(compiled, optimizer)  # nor is the first one taken for this one
        train(recorded, steps)
        train(compiled, optimizer)
        train(recorded, steps)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_grad_rms").tolist() == run.steps("hidden_rms").tolist() == [0, 1]
    plain = Stack(blocks=2)
    with probes.record(plain, tmp_path / "plain", optimizer=(eager := sgd(plain)), every=1):
        train(plain, eager)
    torch.testing.assert_close(
        torch.tensor(run["hidden_grad_rms"][0]),
        torch.tensor(probes.open_run(tmp_path / "plain")["hidden_grad_rms"][0]),
    )
    assert not [r for r in caplog.records if r.name == "depthscope" and r.levelname == "WARNING"]


def test_an_eager_model_with_compiled_helpers_is_not_refused(tmp_path):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.scale = torch.compile(lambda x, weight: x * weight, backend="aot_eager")

        def forward(self, x):
            return self.scale(x, self.weight)

    model = Stack(blocks=2)
    for block in model.blocks:
        block.attn_norm, block.mlp_norm = Gain(), Gain()
    optimizer = sgd(model)
    train(model, optimizer)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer)
    assert probes.open_run(tmp_path / "run").steps("hidden_rms").tolist() == [0]
