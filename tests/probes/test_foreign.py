"""Depth weights of AttnRes code nobody adapted, against the model's own softmax."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import probes
from tests.probes.foreign import LAYOUTS, NORMALISERS, Foreign
from tests.probes.foreign_families import FAMILIES, PaperBlock, ReadAfter
from tests.probes.models import hooks_on, sgd

TOLERANCE = 1e-4


def tokens(*shape):
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(1))


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(batch, batch)[1]
    loss.backward()
    optimizer.step()
    return loss.item()


def recorded(model, path, batch, steps: int = 1, **options):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True, **options):
        for _ in range(steps):
            step(model, optimizer, batch)
    return probes.open_run(path)


def own_weights(model, batch) -> list[np.ndarray]:
    """The weights that the model says it used, [S, B, T] by read."""
    twin = copy.deepcopy(model)
    for read in twin.reads:
        read.asked = True
    twin(batch)
    return [read.weight.numpy() for read in twin.reads if read.weight is not None]


def assert_own(run, own) -> None:
    assert [read.sources for read in run.reads] == [len(weight) for weight in own]
    for row, weight in enumerate(own):
        flat = weight.reshape(len(weight), -1)
        found = {name: run[name][0][row][: len(weight)] for name in ("depth_weight", "depth_weight_std")}
        np.testing.assert_allclose(found["depth_weight"], flat.mean(1), atol=TOLERANCE)
        # A difference of squares in float32: a spread of zero comes out as up to 3e-4.
        np.testing.assert_allclose(found["depth_weight_std"], flat.std(1), atol=1e-3)
        assert np.isnan(run["depth_weight"][0][row][len(weight) :]).all()


@settings(max_examples=settings.default.max_examples // 3)
@given(
    layout=some.sampled_from(LAYOUTS),
    normaliser=some.sampled_from(NORMALISERS),
    size=some.sampled_from([None, 2, 3]),
    quirk=some.sampled_from(
        [(), ("embedding twice",), ("zero partial",), ("never reset",), ("no final mix",)]
    ),
)
def test_weights_are_the_models_own(tmp_path_factory, layout, normaliser, size, quirk):
    if layout in ("attention kernel", "online softmax"):
        normaliser = "softmax"  # theirs is built in
    quirk = quirk if size is not None or quirk == ("no final mix",) else ()
    model = Foreign(layout, normaliser, size, blocks=2, width=12, quirks=quirk)
    batch = tokens(3, 10)
    own = own_weights(model, batch)
    assert_own(recorded(model, tmp_path_factory.mktemp("foreign") / "run", batch), own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path):
    model, batch = Foreign(layout), tokens(4, 9)
    own = own_weights(model, batch)
    assert_own(recorded(model, tmp_path / "run", batch), own)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_every_normaliser(normaliser, tmp_path):
    model, batch = Foreign("inline", normaliser, size=2), tokens(4, 9)
    own = own_weights(model, batch)
    assert_own(recorded(model, tmp_path / "run", batch), own)


ODD = {
    "embedding twice": "duplicate sources",
    "zero partial": "zero sources",
    "never reset": "cumulative sources",
    "layers twice": "runs several times",
    "detached": "detached sources",
    "no final mix": "no final read",
    "list emptied": "never called",
}


@pytest.mark.parametrize("quirk", ODD)
def test_what_is_odd_is_survived_and_named(quirk, tmp_path):
    model = Foreign("list", size=None if quirk == "detached" else 2, quirks=(quirk,))
    described = str(probes.describe(model))
    assert ODD[quirk] in described
    batch = tokens(4, 9)
    own = own_weights(model, batch)
    assert_own(recorded(model, tmp_path / "run", batch), own)


def test_all_that_our_own_reads_give(tmp_path):
    model, batch = Foreign("key norm module"), tokens(4, 9)
    own = own_weights(model, batch)
    run = recorded(model, tmp_path / "run", batch)
    queries = [read.query * read.norm.weight for read in Foreign("key norm module").reads]
    np.testing.assert_allclose(run["query_norm"][0], [q.norm().item() for q in queries], rtol=1e-5)
    entropy = -(own[3] * np.log(own[3])).sum(0).mean() / np.log(4)
    np.testing.assert_allclose(run["depth_entropy"][0][3], entropy, rtol=1e-4)
    even = run["contribution_rms"][0][2]
    assert np.isfinite(even[:3]).all() and np.isnan(even[3:]).all()
    assert run["read_error"][0].max() < 1e-5
    assert [layer.kind for layer in run.layers] == ["attention", "mlp"] * 2
    assert [layer.block for layer in run.layers] == [1, 1, 2, 2]
    assert [source.label for source in run.sources][:2] == ["embedding", "layer 1 (attention)"]
    for name in ("hidden_rms", "output_rms", "output_grad_rms", "param_grad_norm"):
        assert np.isfinite(run[name][0]).all(), name


def test_recording_changes_no_bit_and_leaves_nothing(tmp_path):
    batch = tokens(2, 8)
    plain, watched = Foreign("inline", size=2), Foreign("inline", size=2)
    optimizer = sgd(plain)
    before = torch.get_rng_state()
    losses = [step(plain, optimizer, batch) for _ in range(3)]
    optimizer = sgd(watched)
    with probes.record(watched, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=2):
        assert torch.equal(torch.get_rng_state(), before)
        assert [step(watched, optimizer, batch) for _ in range(3)] == losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert hooks_on(watched) == 0


def test_weights_that_explain_nothing_are_left_out_and_said(tmp_path, caplog):
    """Dropout on the weights themselves: what was used cannot be known afterwards."""

    class Dropped(Foreign):
        def read(self, number, done, partial):
            values = torch.stack(done)
            logits = self.reads[number].logits(self.reads[number].keys(values))
            weight = torch.nn.functional.dropout(logits.softmax(0), 0.5, self.training)
            return torch.einsum("sbt,sbtd->btd", weight, values)

    run = recorded(Dropped("inline"), tmp_path / "run", tokens(4, 9))
    assert "depth_weight" not in run.metrics or np.isnan(run["depth_weight"][0][1:]).all()
    assert "do not give back the state" in caplog.text


@pytest.mark.parametrize("mode", ["full", "block"])
def test_attn_res_of_the_package_index(mode, tmp_path):
    attn_res = pytest.importorskip("attn_res")
    torch.manual_seed(0)
    kind = attn_res.AttnResMode(mode)
    config = attn_res.TransformerConfig(
        d_model=32, n_layers=6, n_heads=2, n_kv_heads=1, vocab_size=19, attn_res_mode=kind, n_blocks=3
    )
    model = attn_res.AttnResTransformer(config)
    own = []

    def keep(module, args, output):
        logits = torch.einsum("d,nbtd->nbt", module.pseudo_query, module.key_norm(args[0]))
        own.append(logits.softmax(0).detach().numpy())

    twin = copy.deepcopy(model)
    for one, two in zip(model.layers, twin.layers, strict=True):
        torch.nn.init.normal_(one.attn_res.pseudo_query)
        two.attn_res.pseudo_query.data.copy_(one.attn_res.pseudo_query)
        two.attn_res.register_forward_hook(keep)
    batch = tokens(3, 10)
    twin(batch)
    run = recorded(model, tmp_path / "run", batch)
    assert_own(run, own)
    assert [source.kind for source in run.sources][1] == ("attention" if mode == "full" else "depth block")


COMPILED = ["inline", "key norm module", "committed and partial", "attention kernel"]


@pytest.mark.long
@pytest.mark.parametrize("layout", COMPILED)
def test_compiled_without_a_graph_break(layout, tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend

    logging.getLogger("torch.__trace").propagate = False
    torch._dynamo.reset()
    model, batch = Foreign(layout, size=2), tokens(2, 8)
    own = own_weights(model, batch)
    optimizer, counter = sgd(model), CompileCounterWithBackend("aot_eager")
    options = {"every": 2, "matrices_every": 4, "tokens_every": 4, "strict": True}
    with probes.record(model, tmp_path / "run", optimizer=optimizer, **options):
        model.compile(fullgraph=True, backend=counter)
        for _ in range(5):
            step(model, optimizer, batch)
    torch._dynamo.reset()
    assert counter.frame_count == 3
    run = probes.open_run(tmp_path / "run")
    assert_own(run, own)
    assert run.token_steps.tolist() == [0, 4]
    for row, expected in enumerate(own):
        found = run.tokens(0).weight[:, :, row, : len(expected)].transpose(2, 0, 1)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_an_author_gives_the_weights_by_hand(tmp_path):
    """Where nothing else shows them: one line per read, in a model recorded with `layers=L`."""

    class Marked(Foreign):
        def forward(self, idx, targets):
            x = probes.mark(self.wte(idx), output=0)
            sources = [x]
            for number, layer in enumerate((self.blocks[0].attn, self.blocks[0].mlp), 1):
                x = probes.mark(layer(self.read(number, sources, None)), output=number)
                sources.append(x)
            logits = self.head(self.read(3, sources, None))
            return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        def read(self, number, done, partial):
            read = self.reads[number - 1]
            values = torch.stack(done)
            weight = probes.mark(read.kept(read.logits(read.keys(values)).softmax(0)), read=number)
            return (weight.unsqueeze(-1) * values).sum(0)

    model, batch = Marked(blocks=1), tokens(3, 8)
    optimizer = sgd(model)
    for read in model.reads:
        read.asked = True
    with probes.record(model, tmp_path / "run", optimizer=optimizer, matrices_every=1, layers=2, strict=True):
        step(model, optimizer, batch)
    run = probes.open_run(tmp_path / "run")
    assert_own(run, [read.weight.numpy() for read in model.reads])
    assert np.isfinite(run["contribution_rms"][0][2]).all()
    with pytest.raises(ValueError, match="one of the three"):
        probes.mark(torch.zeros(1), read=1, state=1)


def family_run(model, path):
    """A recorded step, and the weights the same forward used by the model's own word."""
    batch, twin = tokens(3, 10), copy.deepcopy(model)
    for read in twin.modules():
        if isinstance(read, PaperBlock):
            read.kept[0] = twin
    twin.own = []
    torch.manual_seed(3)
    twin(batch, batch)
    torch.manual_seed(3)
    return recorded(model, path, batch), [weight.numpy() for weight in twin.own]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    run, own = family_run(FAMILIES[family](), tmp_path / "run")
    assert_own(run, own)
    assert len(run.layers) == (8 if family == "Paper" else 4)
    assert np.isfinite(run["output_rms"][0]).all()


class Scaled(ReadAfter):
    scale = 1.0

    def stream(self, x):
        sources, state = [x], x * self.scale
        for index, layer in enumerate(self.sublayers):
            sources.append(layer(self.norms[index](state)))
            state = self.mix(sources, index + 1)
        return state


def test_a_first_layer_that_receives_something_else_than_the_embedding_is_blank(tmp_path, caplog):
    model, batch = Scaled(), tokens(3, 10)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        step(model, optimizer, batch)
        model.scale = 1.5
        step(model, optimizer, batch)
    run = probes.open_run(tmp_path / "run")
    assert run["depth_weight"][0, 0, 0] == 1 and run["read_error"][0, 0] < 1e-6
    assert np.isnan(run["depth_weight"][1, 0]).all() and run["read_error"][1, 0] == pytest.approx(
        1 / 3, rel=1e-3
    )
    assert "do not give back the state, so those reads are blank: layer 1" in caplog.text


def test_a_first_layer_that_reads_nothing_has_weight_one(tmp_path):
    run, own = family_run(ReadAfter(), tmp_path / "run")
    one = np.ones_like(own[0][:1])
    assert_own(run, [one, *own])
    assert [read.layer for read in run.reads] == [1, 2, 3, 4, None]


def test_reads_apart_have_rows_of_their_own(tmp_path):
    run, _ = family_run(FAMILIES["Apart"](), tmp_path / "run")
    assert [read.layer for read in run.reads] == [1, 1, 1, 2, 3, 3, 3, 4, None]
    assert run.reads[1].label.endswith("read 2 of 3")


@pytest.mark.parametrize(
    ("layout", "size"), [("inline", None), ("flat tokens", 2), ("committed and partial", 3)]
)
def test_single_tokens_are_followed(layout, size, tmp_path):
    model, batch = Foreign(layout, size=size), tokens(3, 9)
    optimizer, own = sgd(model, 0.5), {}
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, tokens_every=2, strict=True):
        for number in range(3):
            own[number] = own_weights(model.eval(), batch[:2])
            model.train()
            step(model, optimizer, batch)
    assert hooks_on(model) == 0
    run = probes.open_run(tmp_path / "run")
    assert run.token_steps.tolist() == [0, 2]
    for number in (0, 2):
        weight = run.tokens(number).weight
        assert weight.shape == (2, 9, len(run.reads), len(run.sources))
        for row, expected in enumerate(own[number]):
            found = weight[:, :, row, : len(expected)].transpose(2, 0, 1)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_followed_tokens_of_a_read_that_cannot_be_checked_are_blank(tmp_path, monkeypatch):
    monkeypatch.setattr("probes.read_taps.tolerance", lambda dtype: -1.0)
    model = Foreign("inline", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=1):
        step(model, optimizer, tokens(2, 5))
    assert np.isnan(probes.open_run(tmp_path / "run").tokens(0).weight).all()


class InFloat32(Foreign):
    """Reads in float32 whatever the precision around them."""

    def read(self, number, done, partial):
        read, values = self.reads[number], torch.stack(done)
        with torch.autocast("cpu", enabled=False):
            weight = read.kept((read.norm(values.float()) @ read.query).softmax(0))
            return (weight.unsqueeze(-1) * values.float()).sum(0)


class NewestFirst(Foreign):
    """Sources in reverse, a view that borrows its shape, a sum that begins with zeros."""

    def read(self, number, done, partial):
        read, values = self.reads[number], torch.stack(done[::-1], 2).flatten(0, 1)
        weight = (read.keys(values) @ read.query).softmax(-1)
        read.kept(weight.flip(-1).view(*done[0].shape[:2], -1).movedim(-1, 0))
        mix = torch.zeros_like(values[:, 0])
        for place in range(len(done)):
            mix = torch.addcmul(mix, weight[:, place, None], values[:, place])
        return mix.view_as(done[0])


def test_reads_in_reverse(tmp_path):
    model, batch = NewestFirst(), tokens(3, 8)
    own = own_weights(model, batch)
    assert_own(recorded(model, tmp_path / "run", batch), own)


def test_a_read_that_leaves_autocast(tmp_path):
    model, batch = InFloat32(), tokens(4, 9)
    optimizer = sgd(model)
    with (
        probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, strict=True),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        own = own_weights(model, batch)
        step(model, optimizer, batch)
    assert_own(probes.open_run(tmp_path / "run"), own)
