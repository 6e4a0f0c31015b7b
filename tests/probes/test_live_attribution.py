"""depth_attribution against captum, plain autograd in float64, measured losses, and models whose answer is known.

Micro-batches and whole runs have their twin in test_twin.py, scaled losses in test_scaling.py.
"""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

import probes
from probes.finding import find_sites
from probes.gates import Gates
from tests.attnres.models import RESIDUALS, lively_decoder, loss_of, tokens
from tests.probes.foreign import Foreign
from tests.probes.live import MODELS, loss_on, recorded
from tests.probes.models import decoder


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_captum_says(name, tmp_path):
    model, inputs = MODELS[name](), tokens()
    twin = copy.deepcopy(model).double()
    sites = find_sites(twin)
    gates, layout = Gates(sites), sites.layout

    def call(given):
        gates.edges = given[0]
        with gates.hung():
            return loss_on(inputs)(twin).unsqueeze(0)

    ones = torch.ones(1, *layout.triangle().shape, dtype=torch.float64)
    theirs = -InputXGradient(call).attribute(ones.requires_grad_())[0].detach().numpy()
    run, _ = recorded(model, tmp_path / "run", loss_on(inputs))
    assert_same(run, np.where(layout.triangle(), theirs, np.nan))


def assert_same(run, expected, tolerance=1e-5):
    """To 1e-5 of each value; of the largest, where nearly nothing is left of large parts, as in a row of one."""
    found = run["depth_attribution"][0]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    most = np.nanmax(np.abs(expected))
    assert most > 1e-4
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * most)


def branches(model, inputs, norms):
    """In float64, with plain autograd: the gradient of something added to what each norm receives, and to nothing
    else."""
    added = []

    def before(module, args):
        added.append(torch.zeros_like(args[0], requires_grad=True))
        return args[0] + added[-1]

    handles = [norm.register_forward_pre_hook(before) for norm in norms(model)]
    gradients = torch.autograd.grad(loss_on(inputs)(model), added)
    for handle in handles:
        handle.remove()
    return gradients


@pytest.mark.parametrize("name", ["llama", "layer norms"])
def test_of_a_baseline_it_is_the_gradient_of_the_branch(name, tmp_path):
    model, inputs = MODELS[name](), tokens()
    twin = copy.deepcopy(model).double()
    inner = twin.model if name == "llama" else twin.inner
    if name == "llama":
        norms = [n for layer in inner.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        norms.append(inner.norm)
    else:
        norms = [n for block in inner.blocks for n in (block.attention_norm, block.mlp_norm)]
        norms.append(inner.final_norm)
    states = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
    gradients = branches(twin, inputs, lambda model: norms)
    sources = [states[0], *(after - before for before, after in itertools.pairwise(states))]
    expected = np.full((5, 5), np.nan)
    for row, gradient in enumerate(gradients):
        for source in range(row + 1):
            expected[row, source] = -(gradient * sources[source]).sum().item()
    run, _ = recorded(model, tmp_path / "run", loss_on(inputs))
    assert_same(run, expected)


@pytest.mark.parametrize("layout, size", [("inline", None), ("list", 2)])
def test_of_foreign_reads(layout, size, tmp_path):
    """Their model makes the mix, and keeps it where a hook can add to it."""
    model, inputs = Foreign(layout, size=size), tokens()
    twin = copy.deepcopy(model).double()
    for read in twin.reads:
        read.asked = True
    run, _ = recorded(model, tmp_path / "run", loss_on(inputs))
    sites = find_sites(model)
    norms = [read.state.module for read in sites.found.reads]
    names = {module: name for name, module in model.named_modules()}
    theirs = [twin.get_submodule(names[module]) for module in norms]
    outputs = []
    for site in find_sites(model).layers:
        twin.get_submodule(names[site.output.module]).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
    first = []
    twin.wte.register_forward_hook(lambda module, args, output: first.append(output))
    twin.wpe.register_forward_hook(lambda module, args, output: first.append(first.pop() + output))
    gradients = branches(twin, inputs, lambda model: theirs)
    every = [*first[:1], *outputs]
    weights = [read.weight for read in twin.reads if read.weight is not None]
    rows, columns = len(run.reads), len(run.sources)
    expected = np.full((rows, columns), np.nan)
    for row, (gradient, weight, read) in enumerate(zip(gradients, weights, run.reads, strict=True)):
        for column, source in enumerate(run.sources[: read.sources]):
            last = len(outputs) if read.layer is None else read.layer - 1
            value = sum(every[source.first : min(source.last, last) + 1])
            part = weight[column].to(value).unsqueeze(-1) * value
            expected[row, column] = -(gradient * part).sum().item()
    assert_same(run, expected, 1e-4)


@pytest.mark.parametrize("layout, size", [("inline", None), ("list", 2)])
def test_a_first_layer_that_is_given_the_embedding_itself_stays_blank(layout, size, tmp_path):
    """The gradient of the embedding is that of all reads, so nothing tells what layer 1 alone does with it."""
    model, inputs = Foreign(layout, size=size, quirks=("no first read",)), tokens()
    found = probes.attribute(copy.deepcopy(model), inputs, methods=["gradient"])
    run, _ = recorded(model, tmp_path / "run", lambda model: loss_of(model(inputs)[:, :-1], inputs[:, 1:]))
    live = run["depth_attribution"][0]
    assert np.isnan(live[0]).all() and not np.isnan(live[1, :2]).any()
    assert abs(found.edges["gradient"][0, 0]) < 1e-5
    expected = found.edges["gradient"][1:]
    np.testing.assert_allclose(live[1:], expected, rtol=1e-4, atol=1e-4 * np.nanmax(np.abs(expected)))


# Answers that are known beforehand


@pytest.mark.parametrize("name", ["full", "block", "prenorm", "layer norms"])
def test_the_slope_is_what_small_scalings_do(name, tmp_path):
    """The change of the loss per part of an edge that is taken away, measured."""
    model, inputs = MODELS[name]().double(), tokens()
    twin = copy.deepcopy(model)
    found = recorded(model, tmp_path / "run", loss_on(inputs))[0]["depth_attribution"][0]
    gates = Gates(find_sites(twin))
    told, slopes = [], []
    for row, source in zip(*np.nonzero(~np.isnan(found)), strict=True):
        losses = []
        for part in (-1e-4, 1e-4):
            gates.edges = torch.ones(found.shape, dtype=torch.float64)
            gates.edges[row, source] -= part
            with gates.hung(), torch.no_grad():
                losses.append(loss_on(inputs)(twin).item())
        slopes.append((losses[1] - losses[0]) / 2e-4)
        told.append(found[row, source])
    assert np.polyfit(told, slopes, 1)[0] == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(slopes, told, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_behind_a_norm_a_read_sums_to_nothing(name, tmp_path):
    """A norm forgets the size of what it is given, but for its eps."""
    if name == "layer norms":
        pytest.skip("their eps is large")
    found = recorded(MODELS[name](), tmp_path / "run", loss_on(tokens()))[0]["depth_attribution"][0]
    several = found[1:]
    assert np.abs(np.nansum(several, 1)).max() < 1e-4 * np.nanmax(np.abs(several))


def sharp(only=None, never=None):
    """A model whose last read takes one source alone, or all but one: its logits are far apart."""
    model = decoder("full", blocks=2)
    read = model.residual.reads[-1]

    def choose(module, args, output):
        sources, weight = args[0], output[1].detach().clone()
        if never is not None:
            weight[never] = 0
        else:
            weight.zero_()
            weight[only] = 1
        return sum(w.unsqueeze(-1) * s for w, s in zip(weight, sources, strict=True)), weight

    read.register_forward_hook(choose)
    return model


def test_a_source_that_is_ignored_has_exactly_nothing(tmp_path):
    found = recorded(sharp(never=2), tmp_path / "run", loss_on(tokens()))[0]["depth_attribution"][0]
    assert found[4, 2] == 0 and (np.abs(found[4, [0, 1, 3, 4]]) > 1e-6).all()


def test_a_source_whose_weight_vanishes_has_exactly_nothing(tmp_path):
    """By the model's own softmax: logits so far apart that a float32 weight is zero."""
    model = decoder("full", blocks=2)
    read, used = model.residual.reads[2], []
    read.register_forward_hook(lambda module, args, output: used.append(output[1].detach()))
    with torch.no_grad():
        model.embedding.weight.abs_()
        read.query.fill_(-1e4)
    run, _ = recorded(model, tmp_path / "run", loss_on(tokens()))
    found, (weight,) = run["depth_attribution"][0, 2, :3], used
    assert (weight[0] == 0).all() and found[0] == 0 and (found[1:] != 0).any()


def test_the_only_source_has_all(tmp_path):
    model = sharp(only=3)
    model.final_norm.eps = (
        100.0  # behind a norm that forgets all sizes even the only source would have nothing
    )
    found = recorded(model, tmp_path / "run", loss_on(tokens()))[0]["depth_attribution"][0]
    assert (found[4, [0, 1, 2, 4]] == 0).all() and abs(found[4, 3]) > 1e-3


def test_what_nothing_reads_has_exactly_nothing(tmp_path):
    """A layer that returns zero whatever it is given: its reads and its output do nothing."""
    model = decoder("prenorm", blocks=2)
    with torch.no_grad():
        model.blocks[0].mlp.output.weight.zero_()
    found = recorded(model, tmp_path / "run", loss_on(tokens()))[0]["depth_attribution"][0]
    assert (found[1, :2] == 0).all() and (found[2:, 2] == 0).all() and (found[3, [0, 1, 3]] != 0).all()


# What is not known


def test_a_norm_that_is_none_leaves_its_read_blank(tmp_path, caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.gain * x / (1 + x.abs().mean(-1, keepdim=True))

    model = decoder("prenorm", blocks=2)
    model.blocks[1].mlp_norm = Odd()
    with caplog.at_level(logging.INFO):
        run, _ = recorded(model, tmp_path / "run", loss_on(tokens()), steps=2)
    blank = np.isnan(run["depth_attribution"][0]).all(1)
    assert blank.tolist() == [False, False, False, True, False]
    (said,) = [r.getMessage() for r in caplog.records if "attribution" in r.getMessage()]
    assert "layer 4 (MLP)" in said and "layer 3" not in said


@pytest.mark.parametrize("residual", ["postnorm", "deepnorm", "rescaled"])
def test_a_stream_that_is_no_sum_has_none(residual, tmp_path):
    model = lively_decoder(blocks=1, **RESIDUALS[residual]).float()
    assert "depth_attribution" not in recorded(model, tmp_path / "run", loss_on(tokens()))[0]
