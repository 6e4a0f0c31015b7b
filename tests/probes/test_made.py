"""States and outputs that no module is given or returns, as where norms are functions: computed, with the numbers of the
models' own code."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from tests.probes import zoo
from tests.probes.models import batches, loss_of, sgd, train

WIDTH = 48  # not the one of the symbols


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),))


def by_hand(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x) + x.mean(1, keepdim=True)


class Block(nn.Module):
    """Norms are functions, everything between the sublayers and the stream too."""

    def __init__(self, norm):
        super().__init__()
        self.attn = Mixer()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.gate = nn.Parameter(torch.rand(WIDTH))
        self.lambdas = nn.Parameter(torch.tensor([0.8, 0.3]))
        self.norm = norm


class Gated(Block):
    def forward(self, x, x0):
        x = x + zoo.output(self.gate * self.attn(self.norm(zoo.state(x))))
        return x + zoo.output(torch.tanh(self.gate) * self.mlp(self.norm(zoo.state(x))))


class Sandwich(Block):
    def forward(self, x, x0):
        x = x + zoo.output(self.norm(self.attn(self.norm(zoo.state(x)))))
        return x + zoo.output(self.norm(self.mlp(self.norm(zoo.state(x)))))


class Mixed(Block):
    """In the manner of nanochat and its kin: the embedding comes in again at every block."""

    def forward(self, x, x0):
        x = zoo.state(self.lambdas[0] * x + self.lambdas[1] * x0)
        x = x + zoo.output(self.attn(self.norm(x)))
        return x + zoo.output(self.mlp(self.norm(zoo.state(x))))


class Doubled(Block):
    """Scaled between its layers."""

    def forward(self, x, x0):
        x = x + zoo.output(self.attn(self.norm(zoo.state(x))))
        x = zoo.state(2 * x)
        return x + zoo.output(self.mlp(self.norm(x)))


class Model(nn.Module):
    def __init__(self, block, norm):
        super().__init__()
        self.words = nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList(block(norm) for _ in range(2))
        self.head, self.norm = nn.Linear(WIDTH, 17), norm

    def forward(self, tokens):
        x0 = self.words(tokens)
        x = x0 * 1
        for block in self.blocks:
            x = block(x, x0)
        return self.head(self.norm(zoo.state(x)))


CASES = [(Gated, rms_norm), (Sandwich, layer_norm), (Mixed, by_hand), (Doubled, rms_norm)]
UNSEEN = {Gated: [1, 3], Sandwich: [1, 3], Mixed: [0, 2], Doubled: [1, 3]}  # states without a gradient
TRUTH = {
    Mixed: [[1.1], [1.1, 1], [1.18, 0.8, 0.8], [1.18, 0.8, 0.8, 1], [1.18, 0.8, 0.8, 1, 1]],
    Doubled: [[1], [2, 2], [2, 2, 1], [4, 4, 2, 2], [4, 4, 2, 2, 1]],
}


def noted(model, tokens) -> tuple[dict, dict]:
    """RMS of states and outputs, and of their gradients, as the model's own code notes them."""
    zoo.NOTES.append(zoo.Notes())
    try:
        loss_of(model(tokens), tokens).backward()
        notes = zoo.NOTES[-1]
    finally:
        zoo.NOTES.pop()
    model.zero_grad()

    def rms(tensors):
        return [x.detach().double().square().mean().sqrt().item() for x in tensors]

    return {"hidden": rms(notes.states), "output": rms(notes.outputs)}, {
        "hidden": rms([x.grad for x in notes.states]),
        "output": rms([x.grad for x in notes.outputs]),
    }


@pytest.mark.parametrize(("block", "norm"), CASES)
def test_numbers_are_those_of_the_models_own_code(block, norm, tmp_path, caplog):
    torch.manual_seed(0)
    model = Model(block, norm)
    optimizer = sgd(model, 0.5)
    (tokens,) = batches(0, [(2, 7)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        expected = []
        for _ in range(2):  # the second with other parameters
            expected.append(noted(model, tokens))
            loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not caplog.messages
    run = probes.open_run(tmp_path / "run")
    for step, (values, gradients) in enumerate(expected):
        np.testing.assert_allclose(run["hidden_rms"][step], values["hidden"], rtol=1e-5)
        np.testing.assert_allclose(run["output_rms"][step, 1:], values["output"], rtol=1e-5)
        for name, off in (("hidden", 0), ("output", 1)):
            found = run[f"{name}_grad_rms"][step, off:]
            seen = ~np.isnan(found)
            np.testing.assert_allclose(found[seen], np.array(gradients[name])[seen], rtol=1e-4)
    assert np.flatnonzero(np.isnan(run["hidden_grad_rms"][0])).tolist() == UNSEEN[block]
    truth = np.concatenate(TRUTH.get(block, [np.ones(15)]))
    np.testing.assert_allclose(run["mixing_weight"][0][np.tri(5, dtype=bool)], truth, atol=1e-4)
    np.testing.assert_allclose(run["mixing_r2"][0], 1, atol=1e-5)
    told = str(probes.describe(model, tokens))
    assert "made of input of blocks.0" in told and "no gradient" in told


@pytest.mark.parametrize(("block", "norm"), [pytest.param(*CASES[0], marks=pytest.mark.long), CASES[2]])
def test_compiled_as_one_graph(block, norm, tmp_path):
    runs = []
    for way in ("eager", "compiled"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Model(block, norm)
        optimizer = sgd(model)
        trained = torch.compile(model, fullgraph=True, backend="aot_eager") if way == "compiled" else model
        with probes.record(model, tmp_path / way, optimizer=optimizer):
            train(trained, optimizer, 1)
        runs.append(probes.open_run(tmp_path / way))
    for name in ("hidden_rms", "output_rms", "hidden_grad_rms", "output_grad_rms", "mixing_weight"):
        np.testing.assert_allclose(runs[1][name], runs[0][name], rtol=1e-5, err_msg=name)


class Random(Block):
    """What is added cannot be computed a second time."""

    def forward(self, x, x0):
        x = x + F.dropout(self.attn(self.norm(zoo.state(x))), 0.5, self.training)
        return x + self.mlp(self.norm(zoo.state(x)))


class Overwritten(Block):
    """The stream is written to in place, so that tensors kept of it change."""

    def forward(self, x, x0):
        zoo.state(x.clone())
        x += self.gate * self.attn(self.norm(x.double()).float())
        zoo.state(x.clone())
        x += self.gate * self.mlp(self.norm(x.double()).float())
        return x


@pytest.mark.parametrize("block", [Random, Overwritten])
def test_what_cannot_be_computed_is_blank_and_named(block, tmp_path, caplog):
    torch.manual_seed(0)
    model = Model(block, rms_norm)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 7)])
    expected = []
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        zoo.NOTES.append(zoo.Notes())
        loss_of(model(tokens), tokens).backward()
        expected = [x.detach().square().mean().sqrt().item() for x in zoo.NOTES.pop().states]
        optimizer.step()
    values = probes.open_run(tmp_path / "run")["hidden_rms"][0]
    seen = np.isfinite(values)
    np.testing.assert_allclose(values[seen], np.array(expected)[seen], rtol=1e-5)
    told = str(probes.describe(model, tokens))
    if block is Overwritten:
        assert seen.all() and not caplog.messages and "not seen" not in told
    else:
        assert seen.tolist() == [True, False, True, False, True]
        assert "saw nothing of hidden_rms: into layer 2 (MLP)" in caplog.text and "not seen" in told
        assert "probes.mark" in caplog.text and "compiled" not in caplog.text  # nothing is


class Inline(nn.Module):
    """Attention residuals with norms that are functions: no module is given a state."""

    def __init__(self, layers: int = 4):
        super().__init__()
        self.words, self.head = nn.Embedding(17, WIDTH), nn.Linear(WIDTH, 17)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))
        self.queries = nn.Parameter(0.3 * torch.randn(layers + 1, WIDTH))
        self.states = []

    def read(self, sources, row):
        values = torch.stack(sources)
        weights = (rms_norm(values) @ self.queries[row]).softmax(0)
        state = (weights.unsqueeze(-1) * values).sum(0)
        self.states.append(state.detach().square().mean().sqrt().item())
        return rms_norm(state)

    def forward(self, tokens):
        self.states = []
        sources = [self.words(tokens)]
        for row, layer in enumerate(self.layers):
            sources.append(layer(self.read(sources, row)))
        return self.head(self.read(sources, len(self.layers)))


def test_a_state_that_only_its_read_makes(tmp_path, caplog):
    torch.manual_seed(0)
    model = Inline()
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, strict=True):
        train(model, optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    exists = np.tri(5, dtype=bool)
    np.testing.assert_allclose(run["mixing_weight"][0][exists], run["depth_weight"][0][exists], atol=1e-5)
    assert np.isfinite(run["hidden_rms"]).all() and "hidden_grad_rms" not in run.metrics
    assert not [message for message in caplog.messages if "saw nothing" in message]
    assert "made by its read" in str(probes.describe(model))
    (tokens,) = batches(0, [(2, 7)])
    with probes.record(model, tmp_path / "again", optimizer=optimizer):
        loss_of(model(tokens), tokens).backward()
        expected = model.states
        optimizer.step()
    np.testing.assert_allclose(probes.open_run(tmp_path / "again")["hidden_rms"][0], expected, rtol=1e-5)
