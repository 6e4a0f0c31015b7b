"""Attribution against captum and the definition, and on models of which the answer is known beforehand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients, ShapleyValues
from torch import nn
from torch.nn import functional as F

import probes
from probes.attributed import ABLATION, GRADIENT, INTEGRATED, METHODS, OF_EDGES, REMOVAL, SHAPLEY
from probes.attribution import attribute
from probes.finding import find_sites
from probes.gates import Gates
from tests.attnres.models import RESIDUALS, lively_decoder, tokens
from tests.probes.models import hooks_on

THREE = ["prenorm", "full", "block of 2"]


def losses(model, inputs):
    """Next-token loss of each sequence, [B]."""
    each = F.cross_entropy(model(inputs)[:, :-1].flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
    return each.view(len(inputs), -1).mean(1)


def gated(model, row, mass="kept"):
    """A function for captum: gates [B, S] of one read to losses [B]."""
    sites = find_sites(model)
    gates = Gates(sites, mass)
    count = sites.layout.reads[row].sources

    def call(given, inputs):
        edges = torch.ones(len(given), *sites.layout.triangle().shape, dtype=given.dtype)
        edges[:, row, :count] = given
        gates.edges = edges
        with gates.hung():
            return losses(model, inputs)

    return call, torch.ones(2, count, dtype=torch.float64)


@pytest.fixture
def model(request):
    """Four layers."""
    return lively_decoder(blocks=2, **RESIDUALS[request.param])


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_gates_of_one_change_nothing(model):
    sites, inputs = find_sites(model), tokens()
    plain, gates, before = losses(model, inputs), Gates(sites), hooks_on(model)
    gates.edges = torch.ones(sites.layout.triangle().shape)
    gates.layers = torch.ones(len(sites.layers))
    with gates.hung():
        torch.testing.assert_close(losses(model, inputs), plain, rtol=1e-12, atol=0)
    assert hooks_on(model) == before


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_a_read_without_any_source_is_given_nothing(model):
    """Not what rounding leaves of it, which a norm would blow up."""
    sites, seen = find_sites(model), []
    gates, gates.only = Gates(sites), 3
    gates.edges = torch.ones(2, *sites.layout.triangle().shape)
    gates.edges[0, 3] = 0
    with gates.hung(), torch.no_grad():
        handle = model.blocks[1].mlp_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(tokens())
        handle.remove()
    assert (seen[0][0] == 0).all() and (seen[0][1] != 0).any()


@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("model", THREE, indirect=True)
def test_it_is_what_captum_says(model, row):
    inputs = tokens()
    found = attribute(model, inputs, methods=list(OF_EDGES), steps=4, samples=1)
    call, ones = gated(model, row)
    count = ones.shape[1]
    more = {"baselines": torch.zeros_like(ones), "additional_forward_args": (inputs,)}
    theirs = {
        ABLATION: FeatureAblation(call).attribute(ones, **more),
        INTEGRATED: IntegratedGradients(call).attribute(ones, n_steps=4, method="riemann_middle", **more),
    }
    ones.requires_grad_()
    theirs[GRADIENT] = torch.autograd.grad(call(ones, inputs).sum(), ones)[0]
    for name, true in theirs.items():
        np.testing.assert_allclose(
            found.edges[name][row, :count], -true.mean(0).detach(), rtol=1e-5, atol=1e-9
        )
        np.testing.assert_allclose(
            found.edges_std[name][row, :count], true.std(0, correction=0).detach(), rtol=1e-4, atol=1e-9
        )
        assert np.isnan(found.edges[name][row, count:]).all()


@pytest.mark.parametrize("model", ["full"], indirect=True)
def test_all_orders_give_the_shapley_values(model):
    inputs, row = tokens(), 2
    call, ones = gated(model, row)
    exact = ShapleyValues(call).attribute(
        ones, baselines=torch.zeros_like(ones), additional_forward_args=(inputs,)
    )
    found = attribute(model, inputs, methods=[SHAPLEY], samples=6).edges[SHAPLEY][row, :3]
    np.testing.assert_allclose(found, -exact.mean(0), rtol=1e-5)


@pytest.mark.parametrize("mass", ["kept", "shared"])
@pytest.mark.parametrize("model", THREE, indirect=True)
def test_shapley_values_sum_to_the_whole(model, mass):
    found = attribute(model, tokens(), methods=[SHAPLEY], samples=1, mass=mass)
    call, ones = gated(model, 3, mass)
    whole = (call(0 * ones, tokens()) - call(ones, tokens())).mean().item()
    assert np.nansum(found.edges[SHAPLEY][3]) == pytest.approx(whole, rel=1e-9)


def totals(model, row, start: float = 0.0) -> float:
    """What a read as a whole does, from so much of it on."""
    call, ones = gated(model, row)
    return (call(start * ones, tokens()) - call(ones, tokens())).mean().item()


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_integrated_gradients_are_complete_where_steps_resolve_the_norm(model):
    """Here the eps of the norms is as large as what they are given, so that the path has no sudden turn."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1.0
    found = attribute(model, tokens(), methods=[INTEGRATED], steps=16)
    for row in (0, 1, 3):
        assert np.nansum(found.edges[INTEGRATED][row]) == pytest.approx(
            totals(model, row), rel=3e-2, abs=2e-3
        )


@pytest.mark.parametrize(
    "model",
    ["full", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("prenorm", "block of 2"))],
    indirect=True,
)
def test_behind_a_norm_integrated_gradients_miss_what_it_does_next_to_nothing(model):
    """With a small eps a norm gives the same of a hundredth of its input as of all of it: the whole effect of a read lies
    before the first step, and what the values sum to is what happens after it."""
    found = attribute(model, tokens(), methods=[INTEGRATED], steps=60)
    for row in (1, 3):
        assert np.nansum(found.edges[INTEGRATED][row]) == pytest.approx(totals(model, row, 0.005), abs=2e-3)
        assert abs(totals(model, row)) > 0.03


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_behind_a_norm_it_is_all_one_who_takes_over_the_weight(model):
    """The mix without some sources has the same direction either way, and a norm knows directions alone."""
    found = {
        mass: attribute(model, tokens(), methods=[ABLATION, SHAPLEY, REMOVAL], samples=1, mass=mass)
        for mass in ("kept", "shared")
    }
    for kind in ("edges", "layers"):
        kept, shared = (getattr(found[mass], kind) for mass in ("kept", "shared"))
        for name, values in kept.items():
            np.testing.assert_allclose(values, shared[name], atol=2e-3)
            assert np.nanmax(np.abs(values)) > 0.1


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_the_slope_is_what_small_scalings_do(model):
    """First-order prediction against the measured change."""
    found, inputs, small = attribute(model, tokens(), methods=[GRADIENT]), tokens(), 1e-4
    sites = find_sites(model)
    gates = Gates(sites)
    for row, source in ((1, 0), (4, 1)):
        told = []
        for sign in (-1, 1):
            gates.edges = torch.ones(sites.layout.triangle().shape, dtype=torch.float64)
            gates.edges[row, source] += sign * small
            with gates.hung(), torch.no_grad():
                told.append(losses(model, inputs).mean().item())
        assert (told[1] - told[0]) / (2 * small) == pytest.approx(
            -found.edges[GRADIENT][row, source], rel=1e-4, abs=1e-9
        )


@pytest.mark.parametrize("model", THREE, indirect=True)
def test_removing_a_layer_is_making_it_return_nothing(model):
    found = attribute(model, tokens(), methods=[REMOVAL, GRADIENT])
    with torch.no_grad():
        base = losses(model, tokens()).mean().item()
        for row, block in enumerate(model.blocks):
            kept = block.mlp.output.weight.clone()
            block.mlp.output.weight.zero_()
            assert found.layers[REMOVAL][2 * row + 1] == pytest.approx(
                losses(model, tokens()).mean().item() - base
            )
            block.mlp.output.weight.copy_(kept)
    assert np.isfinite(found.layers[GRADIENT]).all() and found.loss == pytest.approx(base)


class Choosing(nn.Module):
    """Reads that ignore a source, or know one only, whatever the weights say."""

    def __init__(self, only: int | None = None, never: int | None = None):
        super().__init__()
        self.inner = lively_decoder(blocks=2, **RESIDUALS["full"])
        last = self.inner.residual.reads[-1]
        self.only, self.never = only, never
        with torch.no_grad():
            self.inner.residual.reads[-1].query.zero_()
        last.register_forward_hook(self._choose)

    def _choose(self, module, args, output):
        sources, weight = args[0], output[1].clone()
        if self.never is not None:
            weight[self.never] = 0
        if self.only is not None:
            weight = torch.zeros_like(weight)
            weight[self.only] = 1
        return sum(w.unsqueeze(-1) * s for w, s in zip(weight, sources, strict=True)), weight

    def forward(self, x):
        return self.inner(x)


def test_a_source_that_is_ignored_gets_nothing_by_every_method():
    found = attribute(Choosing(never=2), tokens(), methods=list(METHODS), steps=4, samples=1)
    for name in OF_EDGES:
        assert found.edges[name][4, 2] == pytest.approx(0, abs=1e-12), name
        assert abs(found.edges[name][4, 3]) > 1e-6, name


def test_the_only_source_gets_all():
    model = Choosing(only=3)
    model.inner.final_norm.eps = 1.0  # else it forgets the size of its only source, and the slopes are zero
    found = attribute(model, tokens(), methods=list(METHODS), samples=2, steps=20)
    for name in OF_EDGES:
        others = np.delete(found.edges[name][4], 3)
        assert abs(found.edges[name][4, 3]) > 1e-3 and np.abs(others).max() < 1e-12, name
    whole = found.edges[ABLATION][4, 3]
    assert found.edges[SHAPLEY][4, 3] == pytest.approx(whole, rel=1e-9)
    assert found.edges[INTEGRATED][4, 3] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("model", ["full"], indirect=True)
def test_the_model_is_left_as_it_was(model):
    model.train()
    before, hooks = (
        {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)},
        hooks_on(model),
    )
    attribute(model, tokens(), methods=[GRADIENT])
    assert model.training and hooks_on(model) == hooks and all(p.grad is None for p in model.parameters())
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_what_cannot_be_is_one_sentence():
    model = lively_decoder(**RESIDUALS["full"])
    for given, said in (
        ({"methods": ["lime"]}, "'lime': choose among gradient"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"mass": "lost"}, "mass must be 'kept' or 'shared'"),
        ({"mass": "shared", "methods": [INTEGRATED]}, 'need mass="kept"'),
        ({"loss": lambda logits: logits.mean((1, 2), keepdim=True)}, "one number for each sequence"),
        ({"loss": lambda logits: 0.5}, "it gave float"),
        ({"loss": lambda logits: logits["x"]}, "A forward of Decoder and its target failed on one sequence"),
        ({"loss": lambda logits: logits[:, 0, 0] / 0}, "is no finite number on sequence 1"),
        (
            {"what_if": tokens()[:, :3], "loss": lambda x: x.mean((1, 2)) / (x.shape[1] - 3)},
            "is no finite number on sequence 1 of the what-if",
        ),
        ({"what_if": tokens()[:, :1]}, "Of a sequence of one token there is no next one to predict"),
        ({"loss": "loss"}, "loss must be a function of what the model returns, not 'loss'"),
        ({"memory": "much"}, "memory is 'much', which is no size: write it as 8GB"),
        ({"memory": "1 kB"}, "Too little memory"),
    ):
        with pytest.raises(probes.RunError, match=said):
            attribute(model, tokens(), **given)
    with pytest.raises(probes.RunError, match="Of a sequence of one token"):
        attribute(model, tokens()[:, :1])
    with (
        torch.inference_mode(),
        pytest.raises(probes.RunError, match=r"inference_mode.* nothing has a gradient"),
    ):
        attribute(model, tokens())
    with torch.no_grad():
        assert attribute(model, tokens(), memory="64GB").loss > 0
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(probes.RunError, match="The loss of the model as it is is no finite number"):
        attribute(model, tokens())
    with pytest.raises(probes.RunError, match="pass loss="):
        attribute(nn.Sequential(model, nn.Flatten(0, 1)), tokens())
    with pytest.raises(probes.RunError, match="holds no sequence"):
        attribute(model, tokens()[:0])
    with pytest.raises(probes.RunError, match="No transformer layers"):
        attribute(nn.Linear(2, 2), torch.ones(1, 2))


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "attribution.md").read_text()
    code, _ = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    names = {}
    exec(compile(code, "docs/attribution.md", "exec"), names)
    found = names["found"]
    assert found.edges["ablation"].shape == (5, 5) and found.layers["removal"].shape == (4,)
