"""depth_attribution however one trains: checkpointed, padded, in samples of many tokens, compiled; and nothing is kept."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import probes
from probes import edges
from tests.attnres.models import tokens
from tests.probes.live import loss_on, recorded
from tests.probes.models import batches, decoder, sgd
from tests.probes.test_checkpointing import WAYS, Stack
from tests.probes.test_masks import Masked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prenorm", "full"])
def test_activation_checkpointing(kind, way, tmp_path):
    inputs = batches(0, [(2, 8)])[0]
    call = lambda model: model(inputs).square().sin().mean()  # noqa: E731
    made = {"prenorm": Stack, "full": Rechecked}[kind]
    found = recorded(made(WAYS[way]), tmp_path / "found", call)[0]["depth_attribution"]
    plain = recorded(made(None), tmp_path / "plain", call)[0]["depth_attribution"]
    triangle = np.tri(plain.shape[1], dtype=bool)
    assert np.isfinite(plain[0][triangle]).all()
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(plain)))


class Rechecked(nn.Module):
    """A decoder whose reads are computed again in the backward pass."""

    def __init__(self, way):
        super().__init__()
        self.inner = decoder("full", blocks=2)
        if way is not None:
            for read in self.inner.residual.reads:
                self._wrap(read, way)

    def _wrap(self, read, way):
        forward = read.forward
        read.forward = lambda sources, logits=None, mix=None: checkpoint(
            lambda *given: forward(given), *sources, **way
        )

    def forward(self, x):
        return self.inner(x)


def test_padded_tokens_do_not_count(tmp_path):
    """Whatever they hold, and whatever the loss makes of them."""
    inputs = tokens(2, 8)
    mask = torch.arange(8) < torch.tensor([8, 5])[:, None]

    def call(model):
        out = model(inputs, attention_mask=mask.long())
        return out.square().sin().sum()

    model = Masked(decoder("full", blocks=2))
    twin = copy.deepcopy(model)
    found = recorded(model, tmp_path / "run", call)[0]["depth_attribution"][0]
    cut = lambda m: sum(m(inputs[i : i + 1, :n]).square().sin().sum() for i, n in enumerate((8, 5)))  # noqa: E731
    run = recorded(twin, tmp_path / "cut", cut)[0]
    np.testing.assert_allclose(found, run["depth_attribution"][0], rtol=1e-4, atol=1e-5)


def test_several_backward_passes_of_one_forward_add_up(tmp_path):
    inputs = tokens()
    runs = []
    for times in (1, 2):
        model = decoder("prenorm", blocks=2)
        optimizer = sgd(model)
        with probes.record(model, tmp_path / str(times), optimizer=optimizer, strict=True):
            loss = loss_on(inputs)(model)
            for n in range(times):
                loss.backward(retain_graph=n + 1 < times)
            optimizer.step()
        runs.append(probes.open_run(tmp_path / str(times))["depth_attribution"])
    np.testing.assert_allclose(runs[1], 2 * runs[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["prenorm", "full", "block of 2"])
def test_a_sample_of_many_tokens_is_right_on_average(kind, tmp_path, monkeypatch):
    inputs = tokens(4, 8)
    call = loss_on(inputs)
    all_of_them = recorded(decoder(kind, blocks=1), tmp_path / "all", call)[0]["depth_attribution"][0]
    monkeypatch.setattr(edges, "ELEMENTS", 16 * 10)
    model = decoder(kind, blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probes.record(model, tmp_path / "few", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        for _ in range(60):
            call(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    few = probes.open_run(tmp_path / "few")["depth_attribution"]
    error = few.std(0) / np.sqrt(len(few)) + 1e-7
    there = ~np.isnan(all_of_them)
    assert few.std(0)[there].max() > 1e-3  # tokens differ
    assert (np.abs(few.mean(0) - all_of_them) / error)[there].max() < 4


def test_every_token_is_as_likely_as_another():
    x = torch.zeros(37, 4)
    seen = torch.zeros(37)
    old, edges.ELEMENTS = edges.ELEMENTS, 4 * 10
    try:
        for n in range(2000):
            chosen = edges.few(x, torch.tensor(n * 0.7548776662466927 % 1, dtype=torch.float64))
            assert len(chosen.unique()) == 10
            seen[chosen] += 1
    finally:
        edges.ELEMENTS = old
    np.testing.assert_allclose(seen / 2000, 10 / 37, rtol=0.02)


@pytest.mark.long
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_whole_or_block_by_block(whole, tmp_path, monkeypatch):
    """A sample of tokens, in batches of many sizes."""
    monkeypatch.setattr(edges, "ELEMENTS", 16 * 10)
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = decoder("full", blocks=2, context=32)
        optimizer = sgd(model)
        with probes.record(model, tmp_path / f"{compiled}", optimizer=optimizer, every=1, matrices_every=1):
            for module in ([model] if whole else model.blocks) if compiled else ():
                module.compile(backend="aot_eager", fullgraph=True)
            for step, size in enumerate([(4, 8), (4, 12), (5, 20), (2, 6)]):
                (inputs,) = batches(step, [size])
                optimizer.zero_grad()
                loss_on(inputs)(model).backward()
                optimizer.step()
        runs.append(probes.open_run(tmp_path / f"{compiled}")["depth_attribution"])
    eager, found = runs
    assert np.isfinite(eager[0][np.tri(5, dtype=bool)]).all()
    np.testing.assert_allclose(found, eager, rtol=1e-4, atol=1e-4 * np.nanmax(np.abs(eager)))


# Nothing stays


@pytest.mark.parametrize("kind", ["prenorm", "full"])
def test_nothing_is_kept_beyond_the_step(kind, tmp_path, monkeypatch):
    """Even while the script holds on to its loss, and so to the graph with its hooks."""
    kept = []
    real = edges.taken

    def watched(x, tokens):
        made = real(x, tokens)
        kept.append(weakref.ref(made))
        return made

    from probes import edge_taps

    monkeypatch.setattr(edge_taps, "taken", watched)
    model = decoder(kind, blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        loss = loss_on(tokens())(model)
        assert sum(ref() is not None for ref in kept) >= 3
        loss.backward()
        optimizer.step()
        gc.collect()
        assert kept and not [ref for ref in kept if ref() is not None]
        del loss
