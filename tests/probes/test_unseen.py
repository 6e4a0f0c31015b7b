"""Foreign models in which no module is given the state, as where norms are functions; and what attaching leaves alone."""

import collections
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from probes.kernels import certain
from tests.probes.foreign_families import WIDTH, Family
from tests.probes.models import sgd
from tests.probes.test_foreign import assert_own, recorded, step, tokens


class Functional(Family):
    """Norms are functions, depth blocks of unequal size, a temperature that the script may change."""

    temperature = 1.0
    sizes = (1, 3, 2)

    def __init__(self):
        super().__init__(sum(self.sizes))

    def mix(self, sources, read):
        values = torch.stack(sources)
        logits = F.rms_norm(values, (WIDTH,)) @ self.queries[read] / self.temperature
        return torch.einsum("sbt,sbtd->btd", self.kept(logits.softmax(0)), values)

    def stream(self, x):
        done, partial, ends = [x], None, np.cumsum(self.sizes)
        for index, layer in enumerate(self.sublayers):
            state = self.mix([*done, *([] if partial is None else [partial])], index)
            output = layer(F.rms_norm(state, (WIDTH,)))
            partial = output if partial is None else partial + output
            if index + 1 in ends:
                done, partial = [*done, partial], None
        return self.mix(done, -1)

    def forward(self, idx, targets):
        logits = self.head(F.rms_norm(self.stream(self.embedding(idx)), (WIDTH,)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def own_of(model, batch) -> list[np.ndarray]:
    twin = copy.deepcopy(model)
    twin.own = []
    twin(batch, batch)
    return [weight.numpy() for weight in twin.own]


def test_states_that_no_module_is_given_are_checked_by_what_is_made_of_them(tmp_path, caplog):
    model, batch = Functional(), tokens(3, 10)
    own = own_of(model, batch)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        step(model, optimizer, batch)
        model.temperature = 0.3  # a number that was another one when the model was run
        step(model, optimizer, batch)
    run = probes.open_run(tmp_path / "run")
    # Of the first read there is no doubt: it has one source.
    assert_own(run, own[-len(run.reads) :])
    several = [row for row, read in enumerate(run.reads) if read.sources > 1]
    assert run["read_error"][0].max() < 1e-5 and run["read_error"][1, several].min() > 1e-3
    weight = run["depth_weight"][1]
    assert np.isnan(weight[several]).all()
    assert "do not give back the state" in caplog.text
    assert [source.label for source in run.sources][1:] == [
        "depth block 1 (layer 1)", "depth block 2 (layers 2–4)", "depth block 3 (layers 5–6)",
    ]  # fmt: skip


class Window(Family):
    """Reads of the embedding and the two newest sources."""

    def mix(self, sources, read):
        return super().mix([sources[0], *sources[1:][-2:]], read)


def test_reads_of_a_window_are_named(tmp_path):
    model, batch = Window(), tokens(3, 10)
    own = own_of(model, batch)
    assert_own(recorded(model, tmp_path / "run", batch), own)
    assert "reads of different sources" in str(probes.describe(model))


class Keeping(Family):
    """Keeps things on its modules that are nobody's business."""

    def __init__(self):
        super().__init__()
        self._seen, self._shapes, self._last = [], set(), collections.deque(maxlen=3)
        self._by_turn = collections.OrderedDict()

    def forward(self, idx, targets):
        self._seen.append(idx.shape)
        self._shapes.add(idx.shape)
        self._last.append(idx.shape)
        self._by_turn[len(self._seen)] = idx.shape
        return super().forward(idx, targets)


class Odd(nn.Module):
    """A block whose layer says nothing by its name: what it does is tried."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self._states = nn.LayerNorm(16), nn.Linear(16, 16), []

    def forward(self, x):
        self._states.append(x)
        return x + self.one(self.norm(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(19, 16), nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Odd() for _ in range(2))

    def forward(self, idx):
        x = self.words(idx)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_attaching_leaves_what_a_model_keeps_and_the_random_numbers_of_other_devices(tmp_path, monkeypatch):
    model, plain, seeded = Keeping(), Plain(), []
    # It begins the random numbers of all devices anew, those of a GPU that the model has yet to be moved to, too.
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    for name, each in (("plain", plain), ("model", model)):
        probes.record(each, tmp_path / name, optimizer=sgd(each)).close()
    assert not seeded and torch.equal(torch.get_rng_state(), before)
    assert not model._seen and not model._shapes and not model._last and not model._by_turn
    assert not any(block._states for block in plain.blocks)


@pytest.mark.parametrize("apart", [1.0, 1e-2])
def test_weights_solved_for_are_right_or_blank(apart):
    """Of a mix in bfloat16: with sources that are alike rounding is explained by weights that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 2, 8, 64, generator=generator)
    sources = [each.bfloat16() for each in base + apart * torch.randn(4, 2, 8, 64, generator=generator)]
    weight = torch.rand(4, 2, 8, generator=generator)
    mix = sum(w.unsqueeze(-1) * v.float() for w, v in zip(weight, sources, strict=True)).bfloat16()
    found = certain(sources, mix).flatten(1).mean(1)
    if apart == 1:
        torch.testing.assert_close(found, weight.flatten(1).mean(1), atol=2e-2, rtol=0)
    else:
        assert found.isnan().all()
