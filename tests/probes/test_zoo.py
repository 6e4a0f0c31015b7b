"""Layers found in models nobody adapted: their numbers are those that the models' own code notes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.finding import find_sites
from probes.sites import unwrap
from tests.probes import zoo
from tests.probes.models import batches, loss_of, sgd, train


def rms(x) -> float:
    return x.detach().double().square().mean().sqrt().item()


def noted(model) -> dict[str, list[float]]:
    """One training pass of `model`, and what its own code saw."""
    zoo.NOTES.append(zoo.Notes())
    try:
        (tokens,) = batches(0, [(2, 8)])
        torch.manual_seed(5)
        loss_of(model(tokens), tokens).backward()
        notes = zoo.NOTES[-1]
    finally:
        zoo.NOTES.pop()
    model.zero_grad()
    outputs = [notes.states[0], *notes.outputs]
    return {
        "hidden_rms": [rms(x) for x in notes.states],
        "output_rms": [rms(x) for x in outputs],
        "hidden_grad_rms": [rms(x.grad) for x in notes.states],
        "output_grad_rms": [rms(x.grad) for x in outputs],
    }


def recorded(model, path, **options):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **options):
        torch.manual_seed(5)
        train(model, optimizer, 1)
    return probes.open_run(path)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_numbers_are_those_of_the_models_own_code(name, tmp_path, caplog):
    torch.manual_seed(0)
    model = zoo.ZOO[name]()
    expected = noted(model)
    run = recorded(model, tmp_path / "run")
    assert not caplog.messages
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-4, err_msg=metric)
    assert (run["identity_error"][0] < 1e-6).all() == (name != "norms of the sum")
    squares = (run["param_grad_norm"] ** 2).sum(1) + run["other_grad_norm"] ** 2
    np.testing.assert_allclose(squares, run["grad_norm"] ** 2, rtol=1e-6)
    assert (run["param_grad_norm"] > 0).all()


KINDS_FOUND = {
    "sandwich norms": [("attention", 1, "blocks.0.core"), ("mlp", 1, "blocks.0.wide")],
    "side by side": [("attention", 1, "blocks.0.attn"), ("mlp", 1, "blocks.0.mlp")],
    "gates": [("attention", 1, "blocks.0.token_mixing"), ("mlp", 1, "blocks.0.channel_mixing")],
    "wrappers that add": [("attention", 1, "blocks.0.0.inner"), ("mlp", 1, "blocks.0.1.inner")],
    "three layers a block": [
        ("attention", 1, "blocks.0.self_attn"),
        ("attention", 1, "blocks.0.cross_attn"),
        ("mlp", 1, "blocks.0.ffn"),
    ],
    "lists of lists": [("attention", 1, "trunk.layers.0.0"), ("mlp", 1, "trunk.layers.0.1")],
}


@pytest.mark.parametrize("name", KINDS_FOUND)
def test_kinds_blocks_and_names(name):
    found = [(s.layer.kind, s.layer.block, s.layer.name) for s in find_sites(zoo.ZOO[name]()).layers]
    expected = KINDS_FOUND[name]
    assert found[: len(expected)] == expected
    assert found[-1][1] == 2


def test_gates_and_shared_modules_belong_to_layers():
    model = zoo.ZOO["gates"]()
    first, second, *_ = find_sites(model).layer_parameters()
    block = model.blocks[0]
    assert set(first) == {*block.token_mixing.parameters(), *block.modulation.parameters()}
    assert set(second) == set(block.channel_mixing.parameters())


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder(norm_first, tmp_path):
    torch.manual_seed(0)
    model = zoo.Encoder(norm_first)
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        for layer in model.encoder.layers
        for module in (layer.dropout1, layer.dropout2)
    ]
    (tokens,) = batches(0, [(2, 8)])
    model(tokens)
    for handle in handles:
        handle.remove()
    run = recorded(model, tmp_path / "run")
    np.testing.assert_allclose(run["output_rms"][0, 1:], [rms(out) for _, out in seen], rtol=1e-5)
    kinds = [(layer.kind, layer.block, layer.name) for layer in run.layers]
    assert kinds[:2] == [
        ("attention", 1, "encoder.layers.0.self_attn"),
        ("mlp", 1, "encoder.layers.0.linear1 + linear2"),
    ]
    assert (run["identity_error"][0] < 1e-6).all() == norm_first


@pytest.mark.parametrize("name", ["gates", "norms that are no modules"])
def test_compiled_as_one_graph(name, tmp_path):
    torch.manual_seed(0)
    model = zoo.ZOO[name]()
    eager = recorded(model, tmp_path / "eager")
    torch.manual_seed(0)
    model = zoo.ZOO[name]()
    optimizer = sgd(model)
    torch._dynamo.reset()
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    for metric in ("hidden_rms", "output_rms", "hidden_grad_rms", "output_grad_rms"):
        np.testing.assert_allclose(run[metric], eager[metric], rtol=1e-5, err_msg=metric)


# Where the stream is no plain sum


class Fading(zoo.Model):
    """Scales the stream between its blocks, where no block can tell."""

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(0.5 * x)
        return self.head(self.last(x))


def test_a_stream_that_does_not_add_up_is_said_once_with_its_first_layer(tmp_path, caplog):
    run = recorded(Fading(zoo.Sandwich), tmp_path / "run")
    (message,) = caplog.messages
    assert "state into layer 3 (attention) of Fading is not the embedding plus the outputs" in message
    assert (run["identity_error"][0, :2] < 1e-6).all() and run["identity_error"][0, 2] > 0.1
    described = probes.describe(Fading(zoo.Sandwich))
    assert described.holds is False and described.first_broken == 2
    assert "MIXED OTHERWISE: the state into layer 3 (attention)" in str(described)


# Choices


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = zoo.Model(zoo.Sandwich), zoo.Model(zoo.Bare, blocks=3)

    def forward(self, tokens):
        return self.encoder(tokens) + self.decoder(tokens)


def test_two_stacks_are_listed_and_one_is_chosen(tmp_path):
    with pytest.raises(probes.RunError) as caught:
        probes.record(Two(), tmp_path / "run")
    assert "'encoder.blocks' (2 blocks), 'decoder.blocks' (3 blocks)" in str(caught.value)
    assert "stack='decoder.blocks'" in str(caught.value)
    assert len(find_sites(Two(), stack="decoder.blocks").layers) == 6
    both = find_sites(Two(), stack=["encoder.blocks", "decoder.blocks"])
    assert [site.layer.index for site in both.layers] == list(range(1, 11))
    assert [site.layer.block for site in both.layers][-1] == 5


def test_a_pattern_that_matches_nothing_gets_the_nearest_names():
    with pytest.raises(
        probes.RunError, match=r"stack='decoder.block' matches no module of Two: .*'decoder.blocks'"
    ):
        find_sites(Two(), stack="decoder.block")
    with pytest.raises(probes.RunError, match=r"stack=.encoder\.last. is not a list of blocks"):
        find_sites(Two(), stack="encoder.last")


class Opaque(zoo.Bare):
    """Nobody can follow this: what it adds is decided by numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(zoo.WIDTH), nn.LayerNorm(zoo.WIDTH)

    def forward(self, x):
        parts = sorted([x, x], key=lambda part: part.sum().item())
        x = parts[0] + self.attn(self.first(x))
        return x + self.mlp(self.second(x))


def test_layers_named_by_hand(tmp_path):
    model = zoo.Model(lambda: nn.ModuleList([Opaque()])[0])
    # Pairing norms and sublayers in their order is what is left.
    assert [site.state.name for site in find_sites(model).layers][:2] == ["blocks.0.first", "blocks.0.second"]
    options = {
        "layers": ["blocks.*.attn", "blocks.*.mlp"],
        "norms": ["blocks.*.first", "blocks.*.second", "last"],
    }
    run = recorded(model, tmp_path / "run", **options)
    assert [(layer.kind, layer.block) for layer in run.layers] == [
        ("attention", 1), ("mlp", 1), ("attention", 2), ("mlp", 2),
    ]  # fmt: skip
    assert (run["identity_error"][0] < 1e-6).all()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"layers": "blocks.*.attn"}, "Give layers= and norms= together"),
        (
            {"layers": "blocks.*.attn", "norms": "blocks.*.norm"},
            "matches 2 modules and norms= 2: expected one norm",
        ),
        ({"layers": "blocks.*.atn", "norms": "last"}, "layers='blocks.\\*.atn' matches no module"),
        ({"layers": 0}, "give the number of layers that the model marks"),
    ],
)
def test_what_is_named_wrongly_gets_one_sentence(options, sentence, tmp_path):
    with pytest.raises(probes.RunError, match=sentence):
        probes.record(zoo.Model(zoo.Parallel), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class Marked(nn.Module):
    """Two layers in a forward without a structure to find."""

    def __init__(self):
        super().__init__()
        self.words, self.one, self.two = nn.Embedding(zoo.WORDS, zoo.WIDTH), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(zoo.WIDTH, zoo.WORDS)

    def forward(self, tokens):
        x = zoo.state(probes.mark(self.words(tokens), state=1))
        probes.mark(x, output=0)
        x = x + zoo.output(probes.mark(self.one(x).tanh(), output=1))
        x = zoo.state(probes.mark(x, state=2))
        x = x + zoo.output(probes.mark(self.two(x).tanh(), output=2))
        return self.head(zoo.state(probes.mark(x, state=3)))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_author_marks_tensors(compiled, tmp_path, caplog):
    torch.manual_seed(0)
    model = Marked()
    expected = noted(model)
    optimizer = sgd(model)
    torch._dynamo.reset()
    trained = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with probes.record(model, tmp_path / "run", optimizer=optimizer, layers=2):
        train(trained, optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    assert not [record for record in caplog.records if record.name == "depthscope"]
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-5, err_msg=metric)
    assert [layer.label for layer in run.layers] == ["layer 1", "layer 2"]
    assert math.isnan(run["param_norm"][0, 0])  # which parameters are whose, marks do not say


def test_a_mark_without_a_place_says_so():
    with pytest.raises(ValueError, match="give one of the three"):
        probes.mark(torch.zeros(1))


# Looking without touching


class Keeping(zoo.Bare):
    """Keeps things on itself, counts its calls and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.kept = None

    def forward(self, x):
        self.calls.add_(1)
        self.kept = x
        return super().forward(x + 0 * torch.rand(()))


def test_looking_leaves_nothing_behind():
    model = zoo.Model(Keeping)
    before = torch.get_rng_state()
    call = nn.Module.__call__
    sites = find_sites(model)
    assert len(sites.layers) == 4
    assert torch.equal(torch.get_rng_state(), before) and nn.Module.__call__ is call
    assert all(block.kept is None and block.calls == 0 for block in model.blocks)
    assert unwrap(model) is model


def test_describe_says_what_would_be_seen():
    model = zoo.ZOO["gates"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    described = probes.describe(model, torch.zeros(2, 8, dtype=torch.long))
    lines = str(described).splitlines()
    assert lines[0].startswith("Model: ") and "4 layers in 2 transformer blocks" in lines[0]
    row = next(line for line in lines if line.startswith("1 "))
    assert "input of blocks.0.norm_1" in row and "input of blocks.0.norm_2 − state" in row
    assert "identity     holds: every state is the embedding plus the outputs before it" in str(described)
    assert described.holds and "MiB on the model's device" in lines[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_describe_without_a_batch_tries_by_itself_or_asks_for_one():
    assert probes.describe(zoo.ZOO["sandwich norms"]()).invented

    class Picky(zoo.Model):
        def forward(self, tokens, *, key):
            return super().forward(tokens)

    described = probes.describe(Picky(zoo.Bare))
    assert described.holds is None and "not checked: give a batch" in str(described)
    with pytest.raises(probes.RunError, match="The forward of Picky fails on this batch: TypeError"):
        probes.describe(Picky(zoo.Bare), torch.zeros(1, 4, dtype=torch.long))


# What a forward leaves out


class Skipping(zoo.Sandwich):
    """Leaves itself out when told to, as stochastic depth does to whole blocks."""

    skips = False

    def forward(self, x):
        return x if self.skips else super().forward(x)


def test_a_block_left_out_is_blank_and_not_compared_with_an_earlier_forward(tmp_path, caplog):
    torch.manual_seed(0)
    model = zoo.Model(Skipping)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        train(model, optimizer, 1)
        model.blocks[0].skips = True
        train(model, optimizer, 1, start=1)
        model.blocks[0].skips = False  # and of two micro-batches, the second leaves it out
        (tokens,) = batches(2, [(2, 8)])
        loss_of(model(tokens), tokens).backward()
        model.blocks[0].skips = True
        train_on = batches(3, [(2, 8)])[0]
        loss_of(model(train_on), train_on).backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert (run["identity_error"][0] < 1e-6).all()
    assert np.isnan(run["identity_error"][1:]).all()
    assert np.isnan(run["hidden_rms"][1]).tolist() == [True, True, False, False, False]
    assert not [message for message in caplog.messages if "is not the embedding plus" in message]


class Joint(nn.Module):
    """Attends over a second stream too, and takes its own part of the result, as joint attention does."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(zoo.WIDTH), nn.LayerNorm(zoo.WIDTH)
        self.attn, self.mlp = zoo.Mixer(), zoo.mlp()

    def forward(self, x, other):
        n = other.shape[1]
        both = torch.cat([other, self.norm_1(zoo.state(x))], 1)
        x = x + zoo.output(self.attn(both)[:, n:])
        return zoo.state(x) + zoo.output(self.mlp(self.norm_2(x)))


def test_a_part_of_what_a_sublayer_returns_is_told_from_all_of_it(tmp_path, caplog):
    torch.manual_seed(0)
    model = zoo.Model(Joint, zoo.CONDITION)
    expected = noted(model)
    run = recorded(model, tmp_path / "run")
    assert not caplog.messages
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-4, err_msg=metric)
    assert (run["identity_error"][0] < 1e-6).all()


def test_an_identity_that_nobody_could_check_does_not_hold():
    described = probes.describe(zoo.Model(zoo.Sandwich), torch.zeros(0, 8, dtype=torch.long))
    assert described.holds is None and "not checked: no state was seen" in str(described)


def test_a_model_without_values_is_refused_in_one_sentence():
    with torch.device("meta"):
        model = zoo.Model(zoo.Bare)
    with pytest.raises(probes.RunError, match="on the meta device"):
        probes.describe(model)
