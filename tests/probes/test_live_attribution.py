"""depth_attribution against captum, plain autograd in float64, measured losses, and models whose answer is known.

Micro-batches and whole runs have their twin in test_twin.py, scaled losses in test_scaling.py.
"""

import copy
import gc
import itertools
import logging
import weakref

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attnres
import probes
from probes import edges
from probes.finding import find_sites
from probes.gates import Gates
from probes.norms import understood
from tests.attnres.models import RESIDUALS, lively_decoder, tokens
from tests.probes.foreign import Foreign
from tests.probes.models import batches, decoder, loss_of, sgd
from tests.probes.test_checkpointing import WAYS, Stack
from tests.probes.test_masks import Masked


def recorded(model, path, call, steps=1, **options):
    """A run with matrices at every step; `call(model)` gives the loss."""
    optimizer = sgd(model)
    with probes.record(
        model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True, **options
    ) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            call(model).backward()
            optimizer.step()
    return probes.open_run(path), recorder


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=17, num_key_value_heads=1, **sizes)
    model = transformers.LlamaForCausalLM(config).train()
    for parameter in model.parameters():  # as they start, layers add so little that the norms' eps is felt
        nn.init.normal_(parameter, std=0.5)
    return model


def converted(residual):
    model = llama()
    size = {"layers_per_block": 2} if residual == "block" else {}
    attnres.convert(model, residual=residual, example={"input_ids": tokens()}, **size)
    for parameter in model.attnres.parameters():
        nn.init.normal_(parameter)
    return model


class LayerNorms(nn.Module):
    """A decoder of ours with other norms."""

    def __init__(self):
        super().__init__()
        self.inner = decoder("prenorm", blocks=2)
        for block in self.inner.blocks:
            block.attention_norm, block.mlp_norm = (nn.LayerNorm(16, eps=0.1) for _ in range(2))
        self.inner.final_norm = nn.LayerNorm(16)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)

    def forward(self, x):
        return self.inner(x)


def logits_of(model, inputs):
    output = model(inputs)
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def loss_on(inputs):
    return lambda model: loss_of(logits_of(model, inputs), inputs)


MODELS = {
    "prenorm": lambda: decoder("prenorm", blocks=2),
    "layer norms": LayerNorms,
    "full": lambda: decoder("full", blocks=2),
    "block": lambda: decoder("block of 3", blocks=2),
    "llama": llama,
    "llama, full": lambda: converted("full"),
    "llama, block": lambda: converted("block"),
}


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


# Ways to train


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


class Gemma(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(12)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), (12,), eps=self.eps).to(x.dtype) * (1 + self.weight)


NORMS = {
    "rms": lambda eps: nn.RMSNorm(12, eps=eps),
    "rms, no gain": lambda eps: nn.RMSNorm(12, eps=eps, elementwise_affine=False),
    "layer": lambda eps: nn.LayerNorm(12, eps=eps),
    "layer, no gain": lambda eps: nn.LayerNorm(12, eps=eps, elementwise_affine=False),
    "one plus": Gemma,
}


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("name", NORMS)
def test_the_backward_of_a_norm_is_autograds(name, eps):
    module = NORMS[name](eps)
    norm = understood(module)
    for parameter in module.parameters():  # trained since
        nn.init.normal_(parameter)
    for scale in (1e-3, 1, 100):
        x = (scale * torch.randn(5, 12)).requires_grad_()
        gradient = torch.randn(5, 12)
        (expected,) = torch.autograd.grad(module(x), x, gradient)
        error = (norm.backward(x.detach(), gradient) - expected).norm() / expected.norm()
        assert error < (1e-4 if scale == 1e-3 else 1e-5), scale


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(),
        nn.GroupNorm(2, 8),
        nn.LayerNorm([4, 8]),
    ],
)
def test_what_is_no_norm_of_channels_is_not_taken_for_one(module):
    state = torch.get_rng_state()
    assert understood(module) is None
    assert torch.equal(torch.get_rng_state(), state)
