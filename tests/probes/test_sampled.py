"""The sample of tokens, and the metrics made of it beside the mixing."""

import numpy as np
import torch
from torch.nn import functional as F

import probes
from probes.layout import Layer, Layout
from probes.sample import ELEMENTS, TOKENS, Sample
from probes.sampled import of_sample, outliers
from tests.probes.models import batches, decoder, sgd, train
from tests.probes.test_twin import Pass

EPS = float(torch.finfo(torch.float32).eps)


def test_the_sample_is_of_evenly_spaced_tokens_that_count():
    x = torch.arange(4000.0).repeat_interleave(4).reshape(4, 1000, 4)
    sample = Sample(1, torch.device("cpu"))
    sample.keep(x, "state", 0)
    sample.keep(x, "output", 0)
    assert sample.about.tolist() == 2 * [[[TOKENS, 4, EPS]]]
    kept = sample.state[0, : TOKENS * 4].reshape(TOKENS, 4)[:, 0]
    assert torch.equal(kept, torch.arange(TOKENS) * 4000 // TOKENS)
    assert torch.equal(sample.state.nan_to_num(-1), sample.output.nan_to_num(-1))
    mask = torch.zeros(4, 1000, dtype=torch.bool)
    mask[1, 10:13] = True
    sample.keep(x, "state", 0, mask)
    kept = sample.state[0].reshape(-1, 4)[:, 0]
    assert kept[:3].tolist() == [1010, 1011, 1012] and kept[3:].isnan().all()
    mask[2:] = True
    sample.keep(x, "state", 0, mask)
    kept = sample.state[0, : TOKENS * 4].reshape(TOKENS, 4)[:, 0]
    assert kept[:2].tolist() == [1010, 2000] and kept[-1] > 3990 and (kept.diff() > 0).all()
    wide = torch.zeros(9, 2 * ELEMENTS)
    sample.keep(wide, "state", 0)
    assert sample.about[0, 0, 0] == 1


def test_what_has_another_size_is_not_compared():
    sample = Sample(2, torch.device("cpu"))
    x = torch.randn(4, 16)
    for row in range(2):
        sample.keep(x * (row + 1), "state", row)
        sample.keep(torch.randn(4, 16) if row else x, "output", row)
    layout = Layout.build([Layer(1, "mlp", 1, "mlp")])

    def found():
        sampled = {"states": sample.state, "outputs": sample.output, "about": sample.about}
        kept = {name: value.numpy().copy() for name, value in sampled.items()}
        return of_sample(kept, layout, [1])["mixing_r2"]

    assert np.isfinite(found()).tolist() == [True, True]
    sample.keep(torch.randn(4, 8), "output", 1)
    assert np.isfinite(found()).tolist() == [True, False]


def test_outliers_and_cosines_are_those_of_the_definition(tmp_path):
    model = decoder("prenorm", blocks=2)
    (tokens,) = batches(0, [(2, 8)])
    defined = Pass(decoder("prenorm", blocks=2).double(), tokens)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(model, optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    states = [x.detach() for x in defined.states]
    np.testing.assert_allclose(run["hidden_max"][0], [x.abs().max() for x in states], rtol=1e-5)
    kurtosis = [x.pow(4).mean() / x.square().mean() ** 2 for x in states]
    np.testing.assert_allclose(run["hidden_kurtosis"][0], kurtosis, rtol=1e-4)
    pairs = zip(states[:-1], defined.outputs[1:], strict=True)
    cosines = [F.cosine_similarity(state, output.detach(), dim=-1).mean() for state, output in pairs]
    np.testing.assert_allclose(run["output_cosine"][0], cosines, atol=1e-6)


def test_a_token_that_is_not_finite_is_no_outlier():
    x = np.random.default_rng(0).standard_normal((3, 4, 16))
    x[1, 2, 3], x[0, 0, 0] = np.inf, 100
    found = outliers(x, 2 * np.roll(x, 1, axis=0))  # each layer makes twice what it receives
    assert found["hidden_max"][0] == 100 and np.isfinite(found["hidden_max"]).all()
    np.testing.assert_allclose(found["output_cosine"], 1)
    x[2] = np.nan
    assert np.isfinite(outliers(x, x)["hidden_kurtosis"]).tolist() == [True, True, False]
    x[:] = np.inf
    assert outliers(x, x) == {}
