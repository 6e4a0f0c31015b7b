"""Attribution a part at a time and in bounded memory; on foreign, converted and plain models; on models whose answer is known."""

import numpy as np
import pytest
import torch

import probes
from probes.attributed import ABLATION, GRADIENT, METHODS, REMOVAL
from probes.attribution import attribute
from probes.parts import Parts
from tests.attnres.models import RESIDUALS, lively_decoder, tokens
from tests.probes.foreign import Foreign


def test_a_difference_of_logits_is_the_difference():
    from probes.objective import logit

    model, batch = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens()
    one, two, both = (
        attribute(model, batch, methods=[REMOVAL, GRADIENT], loss=loss).layers
        for loss in (logit(3), logit(5), logit(3, minus=5))
    )
    for method in (REMOVAL, GRADIENT):
        np.testing.assert_allclose(both[method], one[method] - two[method], atol=1e-9)


def test_what_is_no_loss_is_ranked_by_the_size_of_its_effects():
    """A logit may fall as well as rise: what holds it up is not the least important."""
    from probes.objective import logit
    from probes.pruning import scores

    model, batch = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens()
    found = attribute(model, batch, methods=[REMOVAL], loss=logit(0, minus=3))
    told = "logit of token 0 minus that of token 3 at position -1"
    assert found.about.target == told and found.about.unit == "logits"
    assert (found.layers[REMOVAL] < 0).any()
    np.testing.assert_array_equal(scores(found, "layers")["attribution"], np.abs(found.layers[REMOVAL]))
    found = attribute(model, batch, methods=[REMOVAL])
    np.testing.assert_array_equal(scores(found, "layers")["attribution"], found.layers[REMOVAL])


# A part at a time


class Counted:
    """How many forwards a model does from the announcement on."""

    def __init__(self, model):
        self.calls, self.told = 0, []
        model.register_forward_pre_hook(self._call)

    def _call(self, *_):
        self.calls += 1

    def announce(self, estimate):
        self.told.append(estimate)
        self.calls = 0

    def passes(self):
        return self.told[-1].forwards + self.told[-1].backwards


@pytest.mark.parametrize("kind", ["full", "deepnorm"])
def test_the_passes_announced_are_those_that_are_made(kind, monkeypatch):
    model, batch = lively_decoder(blocks=2, **RESIDUALS[kind]), tokens(batch=3, length=4)
    monkeypatch.setattr("probes.work.sequences_that_fit", lambda *_: 2)
    counted = Counted(model)
    how = {"methods": list(METHODS), "steps": 2, "samples": 2, "announce": counted.announce}
    attribute(model, batch, what_if=batch.flip(1), **how)
    assert counted.told[-1].at_once == 2 and counted.calls == counted.passes()
    assert counted.told[-1].backwards == 2 * (1 + 2 + (0 if kind == "deepnorm" else 5 * 2))


def test_it_goes_on_where_it_was(tmp_path):
    model, batch = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens()
    whole = attribute(model, batch, methods=[ABLATION, REMOVAL])
    path, counted = tmp_path / "parts" / "x", Counted(model)

    class Interrupting(Parts):
        def __setitem__(self, name, value):
            super().__setitem__(name, value)
            if name.startswith("edges.ablation.2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupting(path) as parts:
        attribute(model, batch, methods=[ABLATION, REMOVAL], parts=parts)
    with Parts(path) as parts:
        kept = list(parts)
        found = attribute(model, batch, methods=[ABLATION, REMOVAL], parts=parts, announce=counted.announce)
        parts.finish()
    assert len(kept) > 4 and 0 < counted.told[0].done < 1 and not list(path.parent.iterdir())
    # Of 4 layers and 1 + 2 + 3 + 4 + 5 edges, all layers and the reads of layers 1 and 2 are done.
    assert counted.calls == counted.passes() == 1 + 3 + 4 + 5
    np.testing.assert_array_equal(found.edges[ABLATION], whole.edges[ABLATION])
    np.testing.assert_array_equal(found.layers[REMOVAL], whole.layers[REMOVAL])
    # Of read 2 the effects were kept and their squares were not.
    np.testing.assert_array_equal(found.edges_token_std[ABLATION], whole.edges_token_std[ABLATION])


@pytest.mark.parametrize("before, after", [(4, 2), (1, 3)])
def test_what_is_done_stays_of_use_where_fewer_or_more_fit(before, after, monkeypatch):
    model, batch, parts = lively_decoder(blocks=1, **RESIDUALS["full"]), tokens(batch=4), {}
    how = {"methods": [REMOVAL, ABLATION], "what_if": tokens(batch=4).flip(1)}
    whole = attribute(model, batch, **how)
    monkeypatch.setattr("probes.work.sequences_that_fit", lambda *_: before)
    attribute(model, batch, **how, parts=parts)
    for name in [name for name in parts if "edges" in name]:
        del parts[name]
    monkeypatch.setattr("probes.work.sequences_that_fit", lambda *_: after)
    counted = Counted(model)
    found = attribute(model, batch, **how, parts=parts, announce=counted.announce)
    curves = 3 + 3  # by weight, share and attribution, and three random orders: each of 6 edges
    assert counted.calls == counted.passes() == -(-4 // after) * (1 + 6 + 1 + curves * 6)
    np.testing.assert_allclose(found.layers[REMOVAL], whole.layers[REMOVAL], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.edges_std[ABLATION], whole.edges_std[ABLATION], rtol=1e-6, atol=1e-12)
    for kind, curve in found.curves.items():
        for ranking, values in curve.values.items():
            np.testing.assert_allclose(values, whole.curves[kind].values[ranking], rtol=1e-9)


def test_what_is_done_is_in_the_file_from_then_on(tmp_path, monkeypatch):
    """Written a moment earlier, what says that it is done would wait for the next part, and be lost with a kill."""
    now = [0.0]
    monkeypatch.setattr("probes.parts.time.monotonic", lambda: now[0])
    parts = Parts(tmp_path / "x")
    now[0] = 9.0
    parts["a|value"], parts["a|done"] = np.ones(3), np.ones(3)
    assert set(Parts(tmp_path / "x")) == {"a|value", "a|done"}


def test_what_a_damaged_part_held_is_computed_again(tmp_path):
    with Parts(tmp_path / "x") as parts:
        parts["a"], parts["b"] = np.ones(3), np.ones(2)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] ^= 1
    (tmp_path / "x").write_bytes(data)
    assert len(Parts(tmp_path / "x")) == 0


def test_memory_bounds_what_goes_through_at_once(monkeypatch):
    from probes import budget

    model, batch, told = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens(batch=5), []
    monkeypatch.setattr("probes.work.resident", lambda: 0)
    monkeypatch.setattr(budget, "resident", lambda: 0)
    whole = attribute(model, batch, methods=[GRADIENT, ABLATION], announce=told.append)
    sizes, one = [], told[0].bytes / 5
    with pytest.raises(probes.RunError, match="Too little memory: one sequence takes") as refused:
        attribute(model, batch, methods=[GRADIENT], memory=1000)
    assert "Allow more, or take shorter sequences" in str(refused.value)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parted = attribute(model, batch, methods=[GRADIENT, ABLATION], memory=2.5 * one, announce=told.append)
    assert told[0].at_once == 5 and told[1].at_once == 2 and max(sizes) == 2
    for method in (GRADIENT, ABLATION):
        np.testing.assert_allclose(parted.edges[method], whole.edges[method], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(parted.edges_std[method], whole.edges_std[method], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(parted.weight, whole.weight, rtol=1e-6)


# Models nobody adapted, and baselines


@pytest.mark.parametrize(
    ("layout", "size"), [("inline", None), ("committed and partial", 2), ("attention kernel", 2)]
)
def test_the_edges_of_models_that_do_not_say_where_they_read(layout, size):
    model = Foreign(layout, size=size).double()
    batch = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(1))
    found = attribute(model, batch, methods=[GRADIENT, ABLATION, REMOVAL])
    for read in model.reads:
        read.asked = True
    model(batch)
    for row, read in enumerate(model.reads):
        weight = read.weight.flatten(1).mean(1)
        if len(weight) == 1 and np.isnan(found.weight[row, 0]):
            assert np.isnan(found.edges[ABLATION][row, 0])  # of one source, and its mix is not seen
            continue
        np.testing.assert_allclose(found.weight[row, : len(weight)], weight, atol=1e-6)
    read = model.reads[-1]
    # The last read without its source 1, by the model's own weights.
    base = attribute(model, batch, methods=[REMOVAL]).loss
    mix = read.mix

    def without(sources):
        made = mix(sources)
        return made - read.weight[1].unsqueeze(-1) * sources[1]

    read.mix = without
    if layout == "committed and partial":
        read.forward = lambda done, partial=None: without(
            [*done.unbind(0), *([] if partial is None else [partial])]
        )
    with torch.no_grad():
        logits = model(batch)
        less = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    assert found.edges[ABLATION][-1, 1] == pytest.approx(less - base, rel=1e-4, abs=1e-9)
    assert found.loss == pytest.approx(base)


@pytest.mark.parametrize("residual", [None, "full", "block"])
def test_a_converted_model_has_edges(residual):
    import attnres

    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=17, num_hidden_layers=2, **shape)
    )
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens(), "attention_mask": mask}
    if residual:
        size = {"layers_per_block": 3} if residual == "block" else {}
        attnres.convert(model, residual=residual, example={"input_ids": tokens()}, **size)
    found = attribute(model, batch, methods=[GRADIENT, ABLATION, REMOVAL])
    with torch.no_grad():
        (mlp,) = [each for name, each in model.named_modules() if name.endswith("layers.0.mlp.down_proj")]
        kept = mlp.weight.clone()
        mlp.weight.zero_()
        assert attribute(model, batch, methods=[REMOVAL]).loss - found.loss == pytest.approx(
            found.layers[REMOVAL][1], abs=1e-6
        )
        mlp.weight.copy_(kept)
    for method in (GRADIENT, ABLATION):
        assert np.isfinite(found.edges[method][found.layout.triangle()]).all()
    assert np.nansum(found.final_share) == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        short = model(input_ids=tokens()[1:, :5], labels=tokens()[1:, :5]).loss
        long = model(input_ids=tokens()[:1], labels=tokens()[:1]).loss
    assert found.loss == pytest.approx(((short + long) / 2).item(), rel=1e-4)  # padding does not count


@pytest.mark.parametrize("mode", ["full", "block"])
def test_attn_res_of_the_package_index(mode):
    attn_res = pytest.importorskip("attn_res")
    torch.manual_seed(0)
    config = attn_res.TransformerConfig(
        d_model=32, n_layers=6, n_heads=2, n_kv_heads=1, vocab_size=19, n_blocks=3,
        attn_res_mode=attn_res.AttnResMode(mode),
    )  # fmt: skip
    model = attn_res.AttnResTransformer(config).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.attn_res.pseudo_query)
    found = attribute(model, tokens(), methods=list(METHODS), steps=2, samples=1, mass="kept")
    assert all(np.isfinite(values).all() for values in found.layers.values())
    assert all(np.isfinite(values).sum() > 10 for values in found.edges.values())

    def nothing(module, args, output):
        return 0 * output

    def changed(sublayer):
        handle = sublayer.register_forward_hook(nothing)
        loss = attribute(model, tokens(), methods=[REMOVAL]).loss
        handle.remove()
        return loss - found.loss

    ways = [changed(child) for child in model.layers[1].children() if child is not model.layers[1].attn_res]
    assert any(way == pytest.approx(found.layers[REMOVAL][1], rel=1e-9) for way in ways)


def test_a_baseline_whose_states_are_no_sums_has_layers_only():
    model = lively_decoder(blocks=2, **RESIDUALS["deepnorm"])
    found = attribute(model, tokens(), methods=list(METHODS), steps=2, samples=1)
    assert not found.edges and set(found.layers) == set(METHODS) - {ABLATION}
    assert "is not the weighted sum of the sources before it" in found.about.notes[0]
    assert np.isnan(found.weight).all() and np.isnan(found.final_share).all()
    with pytest.raises(probes.RunError, match="Its layers can: ask for removal"):
        attribute(model, tokens(), methods=[ABLATION])


class Deaf(torch.nn.Module):
    """A layer whose output nobody hears."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        return 0 * self.inner(*given)


@pytest.mark.parametrize("kind", ["prenorm", "full"])
def test_a_layer_that_adds_nothing_is_needed_by_nobody(kind):
    model = lively_decoder(blocks=2, **RESIDUALS[kind])
    model.blocks[0].mlp = Deaf(model.blocks[0].mlp)
    found = attribute(model, tokens(), methods=list(METHODS), steps=2, samples=2)
    for method, values in found.layers.items():
        assert values[1] == pytest.approx(0, abs=1e-12), method
        assert np.abs(values[[0, 2, 3]]).min() > 1e-7, method
    for method, values in found.edges.items():
        assert values[2:, 2] == pytest.approx(0, abs=1e-12), method


def test_layers_sum_to_the_whole_by_every_method_that_promises_it():
    # Of DeepNorm, which has no edges that would be attributed too.
    model = lively_decoder(blocks=2, **RESIDUALS["deepnorm"])
    found = attribute(
        model, tokens(batch=1, length=4), methods=["integrated", "shapley"], steps=100, samples=2
    )
    gone = attribute(_without_layers(model), tokens(batch=1, length=4), methods=[GRADIENT])
    whole = gone.loss - found.loss
    assert found.layers["shapley"].sum() == pytest.approx(whole, rel=1e-9)
    assert found.layers["integrated"].sum() == pytest.approx(whole, rel=0.02)


def _without_layers(model):
    import copy

    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attention, block.mlp = Deaf(block.attention), Deaf(block.mlp)
    return twin
