"""The final state is what the final norm receives, whatever comes between it and the last block; blank where nobody sees."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import probes
from tests.probes.models import sgd
from tests.probes.test_sites import WIDTH, GPTBlock

WORDS = 11


class Model(nn.Module):
    """Keeps its true final state, after `between` of the states that enter and leave its blocks."""

    normed = True

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.weights = nn.Parameter(torch.randn(4))
        self.query = nn.Parameter(torch.randn(WIDTH))
        self.h = nn.ModuleList(GPTBlock() for _ in range(3))
        if self.normed:
            self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.true = None

    def run(self, block, x):
        return block(x)

    def enter(self, x):
        return x

    def between(self, states):
        return states[-1]

    def pool(self, x):
        return x

    def norm(self, x):
        return self.ln_f(x) if self.normed else F.layer_norm(x, (WIDTH,))

    def forward(self, tokens):
        states = self.states = [self.enter(self.words(tokens))]
        for block in self.h:
            states.append(self.run(block, states[-1]))
        self.left, self.true = states[-1], self.between(states)
        if self.true.requires_grad and not torch.compiler.is_compiling():
            self.true.retain_grad()
        return self.head(self.norm(self.pool(self.true)))


class Elmo(Model):
    """A weighted sum of all (Peters et al. 2018, ELMo)."""

    def between(self, states):
        return sum(w * x for w, x in zip(self.weights.softmax(0), states, strict=True))


class Attending(Model):
    def between(self, states):
        values = torch.stack(states)
        weights = (F.rms_norm(values, (WIDTH,)) @ self.query).softmax(0)
        return (weights.unsqueeze(-1) * values).sum(0)


class Doubled(Model):
    def between(self, states):
        return 2 * states[-1]


class FirstToken(Model):
    def pool(self, x):
        return x[:, 0]


class Mean(Model):
    def pool(self, x):
        return x.mean(1)


class NoNorm(Model):
    normed = False


class NormedFirst(Model):
    """The norm beside the blocks stands before them, as in wav2vec 2.0."""

    def enter(self, x):
        return self.ln_f(x)

    def norm(self, x):
        return F.layer_norm(x, (WIDTH,))


class NormedTwice(NormedFirst, Elmo):
    """The norm stands before and behind them."""

    def norm(self, x):
        return self.ln_f(x)


class Supervised(Model):
    """Every state predicts."""

    def norm(self, x):
        return sum(self.ln_f(state) for state in self.states)


class Routing(NoNorm):
    """What it returns is a loss with another added that is made of every state."""

    def forward(self, tokens):
        logits = super().forward(tokens)
        return logits.square().mean() + sum(self.head(state).softmax(-1).mean() for state in self.states)


class ElmoWithMean(Elmo, Mean):
    pass


class ElmoWithoutNorm(Elmo):
    normed = False


def recorded(model, path, trained=None):
    """Two steps: the run, and the RMS of the final state, of its gradient, and of what the last block returns in each."""
    optimizer = sgd(model)
    truth = []
    with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1):
        for step in range(2):
            tokens = torch.arange(10).view(2, 5).roll(step)
            (model if trained is None else trained)(tokens).square().mean().backward()
            if trained is None:
                tensors = model.true, model.true.grad, model.left
                truth.append([float(x.detach().square().mean().sqrt()) for x in tensors])
            optimizer.step()
            optimizer.zero_grad()
    return probes.open_run(path), np.array(truth)


SIMPLE = [Model, FirstToken, Mean, NoNorm, NormedFirst, Supervised, Routing]


@pytest.mark.parametrize("kind", [*SIMPLE, Elmo, Attending, Doubled, NormedTwice])
def test_what_the_final_norm_receives(kind, tmp_path):
    torch.manual_seed(0)
    model = kind()
    run, truth = recorded(model, tmp_path / "run")
    found = np.stack([run[name][:, -1] for name in ("hidden_rms", "hidden_grad_rms", "block_rms")], 1)
    np.testing.assert_allclose(found, truth, rtol=1e-5)
    plain = kind in SIMPLE
    assert probes.describe(model).holds is plain
    edges = run["depth_attribution"] if "depth_attribution" in run.metrics else np.array([np.nan])
    assert np.isfinite(edges).any() == plain


@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    [
        (Elmo, False),
        pytest.param(Elmo, True, marks=pytest.mark.long),
        pytest.param(NormedFirst, True, marks=pytest.mark.long),
        pytest.param(NormedTwice, True, marks=pytest.mark.long),
        pytest.param(Mean, False, marks=pytest.mark.long),
    ],
)
def test_compiled_as_one_graph(kind, checkpointed, tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = kind()
    eager, _ = recorded(copy.deepcopy(model), tmp_path / "eager")
    if checkpointed:
        model.run = partial(checkpoint, use_reentrant=False)
    compiled, _ = recorded(
        model, tmp_path / "compiled", torch.compile(model, fullgraph=True, backend="aot_eager")
    )
    torch._dynamo.reset()
    for name in (
        "hidden_rms",
        "hidden_grad_rms",
        "block_rms",
        "block_grad_rms",
        "identity_error",
        "nonfinite",
    ):
        np.testing.assert_allclose(compiled[name], eager[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Elmo, NoNorm])
def test_checkpointed_blocks(kind, reentrant, tmp_path):
    torch.manual_seed(0)
    model = kind()
    plain, _ = recorded(copy.deepcopy(model), tmp_path / "plain")
    model.run = partial(checkpoint, use_reentrant=reentrant)
    again, _ = recorded(model, tmp_path / "again")
    for name in ("hidden_rms", "hidden_grad_rms", "block_rms", "block_grad_rms"):
        np.testing.assert_allclose(again[name], plain[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [ElmoWithMean, ElmoWithoutNorm])
def test_what_nobody_sees_is_blank(kind, tmp_path, caplog):
    torch.manual_seed(0)
    model = kind()
    run, _ = recorded(model, tmp_path / "run")
    assert np.isnan(run["hidden_rms"][:, -1]).all() and np.isnan(run["hidden_grad_rms"][:, -1]).all()
    assert np.isfinite(run["hidden_rms"][:, :-1]).all()
    assert "leaves the final state blank: other states are mixed" in caplog.text
    told = probes.describe(model)
    assert told.holds is None and "final state  blank: other states are mixed" in str(told)


@pytest.mark.parametrize("kind", [Elmo, Attending, Doubled])
def test_its_edges_are_not_gated(kind):
    torch.manual_seed(0)
    model = kind()
    with pytest.raises(probes.RunError, match="final state is not the weighted"):
        probes.attribute(model, torch.arange(10).view(2, 5), methods=["ablation"])


@pytest.mark.parametrize("kind", [ElmoWithMean, ElmoWithoutNorm])
def test_edges_into_what_nobody_sees_are_not_gated(kind):
    torch.manual_seed(0)
    with pytest.raises(probes.RunError, match="other states are mixed into what its last transformer block"):
        probes.attribute(
            kind(),
            torch.arange(10).view(2, 5),
            loss=lambda output: output.square().flatten(1).sum(1),
            methods=["ablation"],
        )


def test_edges_of_a_pooled_stream_are_gated():
    """As they are where nothing is pooled, by a model that picks the last token's loss."""
    torch.manual_seed(0)
    model, tokens = FirstToken(), torch.arange(10).view(2, 5)
    found = probes.attribute(model, tokens, loss=lambda output: output.square().sum(-1), methods=["ablation"])
    plain = Model()
    plain.load_state_dict(model.state_dict())
    same = probes.attribute(
        plain, tokens, loss=lambda output: output[:, 0].square().sum(-1), methods=["ablation"]
    )
    np.testing.assert_allclose(found.edges["ablation"], same.edges["ablation"], rtol=1e-4, atol=1e-6)
