"""Recovered mixing: against its definition, blank where it cannot be known; in the writer's thread."""

import json
import threading

import numpy as np
import pytest
import torch

import probes
from probes import samples
from probes.mixing import MIXING_METRICS, definition, recover
from probes.sampled import SAMPLED_METRICS
from tests.probes.models import decoder, sgd, train
from tests.probes.recovering import recorded

EPS = float(torch.finfo(torch.float32).eps)


# Against the definition


def sources(count: int, width: int, tokens: int = 5, alike: float = 0.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(count)
    independent = torch.randn(count, tokens, width, generator=generator)
    return (independent + alike * torch.randn(1, tokens, width, generator=generator)).numpy()


def in_float32(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`given` and `eps` of a model whose states sum all sources before them."""
    return np.arange(1, count + 1), np.full(count, EPS)


@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_all_states_at_once_are_each_by_itself(alike):
    v = sources(7, 40, alike=alike)
    h = sources(8, 40)[1:]  # states that the sources do not explain
    found = recover(h, v, *in_float32(7))
    for state in range(7):
        each = [definition(h[state, token], v[: state + 1, token]) for token in range(5)]
        _, share, r2, condition = zip(*each, strict=True)
        assert np.isnan(found["mixing_weight"][state]).all()
        np.testing.assert_allclose(found["mixing_share"][state, : state + 1], np.mean(share, 0), atol=1e-6)
        assert found["mixing_r2"][state] == pytest.approx(np.mean(r2), abs=1e-6)
        assert found["mixing_condition"][state] == pytest.approx(np.median(condition), rel=1e-6)


@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_weights_by_the_token_are_their_mean(alike):
    v = sources(7, 40, alike=alike)
    a = np.tril(np.random.default_rng(0).normal(size=(5, 7, 7)))  # [token, state, source]
    h = np.einsum("tls,std->ltd", a, v)
    found = recover(h, v, *in_float32(7))["mixing_weight"]
    by_token = [
        [definition(h[state, token], v[: state + 1, token])[0] for token in range(5)] for state in range(7)
    ]
    for state, each in enumerate(by_token):
        np.testing.assert_allclose(found[state, : state + 1], np.mean(each, 0), atol=1e-6)
        np.testing.assert_allclose(found[state, : state + 1], a[:, state, : state + 1].mean(0), atol=1e-5)


def test_a_token_whose_state_is_zero_costs_nothing_else():
    """As padding has, whose embedding is zero."""
    v = sources(3, 32)
    v[:, 1] = 0
    found = recover(v.cumsum(0), v, *in_float32(3))
    assert np.isfinite(found["mixing_share"][np.tri(3, dtype=bool)]).all()
    np.testing.assert_allclose(found["mixing_weight"][np.tri(3, dtype=bool)], 1, atol=1e-6)
    np.testing.assert_allclose(found["mixing_r2"], 1, atol=1e-6)


def test_a_token_without_any_weight_counts_in_the_mean():
    """As where dropout on the weights has taken all of one token's."""
    v = sources(3, 32)
    weight = np.array([[1.0, 0, 0], [0.5, 2, 0], [2, 0.5, 1]])
    tokens = v.shape[1]
    h = np.einsum("ls,std->ltd", weight, v).astype(np.float32)
    h[1, 0] = h[2, :2] = 0
    found = recover(h, v, *in_float32(3))["mixing_weight"]
    share = np.array([1, 1 - 1 / tokens, 1 - 2 / tokens])
    np.testing.assert_allclose(
        found[np.tri(3, dtype=bool)], (share[:, None] * weight)[np.tri(3, dtype=bool)], atol=1e-5
    )


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_something_else_in_a_state_never_makes_a_weight_wrong(size, dtype, tolerance):
    """A layer that nobody named adds to the stream, alike to the others."""
    v = torch.tensor(sources(9, 128, 16, alike=1.0)).to(dtype)
    h = v.cumsum(0, dtype=torch.float32)
    h[5:] += size * (torch.tensor(sources(10, 128, 16))[-1] + v[2])
    eps = np.full(8, torch.finfo(dtype).eps)
    found = recover(h[:8].to(dtype).float().numpy(), v[:8].float().numpy(), np.arange(1, 9), eps)
    truth = np.tri(8)
    off = np.abs(found["mixing_weight"] - truth)
    assert np.isfinite(off[:5][np.tri(8, dtype=bool)[:5]]).all() and np.nanmax(off[:5]) < tolerance
    assert np.isnan(off[5:]).all() or np.nanmax(off[5:]) < tolerance


def test_layers_side_by_side_read_the_same_sources():
    v = sources(4, 32)
    h = np.stack([v[:1].sum(0), v[:1].sum(0), v[:3].sum(0), v.sum(0)])
    found = recover(h, v, np.array([1, 1, 3, 4]), np.full(4, EPS))["mixing_weight"]
    assert np.isnan(found).tolist() == [[n >= k for n in range(4)] for k in (1, 1, 3, 4)]
    np.testing.assert_allclose(found[~np.isnan(found)], 1, atol=1e-6)


def test_more_sources_than_a_quarter_of_the_width_are_blank():
    """Where r2 would be one and the weights wrong."""
    v = sources(60, 48)
    h = v.cumsum(0)
    found = recover(h, v, *in_float32(60))
    for name in MIXING_METRICS:
        assert np.isnan(found[name][12:]).all() and not np.isnan(found[name][:12]).all()
    np.testing.assert_allclose(found["mixing_weight"][:12][np.tri(12, 60, dtype=bool)], 1, atol=1e-5)


def test_what_cannot_be_told_is_blank_and_the_rest_is_right():
    v = sources(6, 64)
    v[1] = 0  # as of a layer whose last matrix is still zero
    v[3] *= 1e-6
    v[5] = v[4]
    h = v.cumsum(0)
    found = recover(h, v, *in_float32(6))
    weight, share = found["mixing_weight"], found["mixing_share"]
    assert np.isnan(weight[5]).tolist() == [False, True, False, True, True, True]
    np.testing.assert_allclose(weight[5, [0, 2]], 1, atol=1e-4)
    np.testing.assert_allclose(weight[4, [0, 2, 4]], 1, atol=1e-4)
    # A source that is next to nothing has a share next to nothing; of two alike nobody knows whose it is.
    np.testing.assert_allclose(share[5, [1, 3]], 0, atol=1e-5)
    assert np.isnan(share[5, 4:]).all() and found["mixing_condition"][5] > 1e4
    np.testing.assert_allclose(share[4].sum(where=~np.isnan(share[4])), 1, atol=1e-5)
    np.testing.assert_allclose(found["mixing_r2"], 1, atol=1e-5)


def test_a_source_that_is_zero_at_some_tokens_is_weighed_at_the_others():
    """As where a layer is dropped for some items."""
    v = sources(4, 64)
    v[2, :2] = 0
    found = recover(v.cumsum(0), v, *in_float32(4))
    np.testing.assert_allclose(found["mixing_weight"][np.tri(4, dtype=bool)], 1, atol=1e-5)
    v[2, :3] = 0
    weight = recover(v.cumsum(0), v, *in_float32(4))["mixing_weight"]
    assert np.isnan(weight[3]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("count, width", [(9, 64), (25, 512), (49, 200)])
@pytest.mark.parametrize("tokens", [2, 32])
def test_a_weight_that_is_shown_is_right_in_every_precision(dtype, tolerance, count, width, tokens):
    """Streams that grow, sources that are alike or fade away: shown or blank, never wrong."""
    eps = np.full(count, torch.finfo(dtype).eps)
    shown = 0
    for alike, fade in ((0, 0), (2, 0), (0, 4), (2, 3)):
        v = torch.tensor(sources(count, width, tokens, alike))
        v = (v * torch.logspace(0, -fade, count)[:, None, None]).to(dtype)
        states = [v[0]]
        for each in v[1:]:
            states.append(states[-1] + each)  # rounded at every sum
        found = recover(torch.stack(states).float().numpy(), v.float().numpy(), np.arange(1, count + 1), eps)
        weight = found["mixing_weight"]
        shown += np.isfinite(weight).sum()
        assert np.nanmax(np.abs(weight - 1)) < tolerance
    # Not by leaving everything blank.
    assert shown > (0.9 if dtype == torch.float32 else 0.35) * 4 * count * (count + 1) / 2


def test_values_that_are_not_finite_cost_their_token_only():
    v = sources(3, 32)
    h = v.cumsum(0)
    h[2, 1, 7], v[1, 3, 0] = np.inf, np.nan
    found = recover(h, v, *in_float32(3))
    np.testing.assert_allclose(found["mixing_weight"][np.tri(3, dtype=bool)], 1, atol=1e-6)
    v[2] = np.nan  # and a source that nobody saw its states
    found = recover(h, v, *in_float32(3))
    assert np.isnan(found["mixing_weight"][2]).all() and np.isfinite(found["mixing_r2"]).tolist() == [1, 1, 0]
    h[:] = np.inf
    assert all(np.isnan(value).all() for value in recover(h, v, *in_float32(3)).values())


# In the writer's thread


def test_a_failure_is_a_fault_like_the_others(tmp_path, monkeypatch, caplog):
    def fail(*values):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("probes.mixing._solved", fail)
    run = recorded(decoder("full", width=64, blocks=1), tmp_path / "run", steps=2, every=1, matrices_every=1)
    (message,) = [record.message for record in caplog.records if record.name == "depthscope"]
    assert f"could not record {', '.join(SAMPLED_METRICS)} at step" in message
    assert "LinAlgError: did not converge. Training goes on" in message
    assert not set(SAMPLED_METRICS) & set(run.metrics)
    assert run.steps("depth_weight").tolist() == run.steps("grad_norm").tolist() == [0, 1]


def test_training_never_waits_for_it(tmp_path, monkeypatch):
    """Samples that the thread has not come to are few; later ones are left out, and the run says so."""
    monkeypatch.setattr(samples, "_WAITING", 0)
    go = threading.Event()
    solve = samples.of_sample

    def late(*values):
        assert go.wait(20)
        return solve(*values)

    monkeypatch.setattr(samples, "of_sample", late)
    model = decoder("full", width=64, blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        train(model, optimizer, 6)
        go.set()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("depth_weight").tolist() == list(range(6))
    assert 1 <= len(run.steps("mixing_weight")) <= 2
    end = json.loads((tmp_path / "run" / "end.json").read_text())
    assert end["missing"]["mixing_weight"]["cause"] == "samples before were not solved yet"
