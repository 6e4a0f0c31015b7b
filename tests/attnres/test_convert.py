"""Models of others with AttnRes put in: against twins by hand, generating, copied, and undone."""

import copy
import gc
import weakref

import pytest
import torch

import attnres
from attnres import definition
from attnres.trying import first_tensor
from tests.attnres.converted import (
    EPS,
    RESIDUALS,
    assert_same_gradients,
    checked,
    checkpointed,
    compiled,
    loss_of,
    prepared,
)
from tests.attnres.families import FAMILIES, LANGUAGE, NEGLIGIBLE_EPS, logits_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_is_the_definition(name, kind):
    found = checked(name, kind)
    assert sum(gradient.norm() > 0 for gradient in found) > len(found) / 2


def test_depth_blocks_of_one_layer_are_full():
    _, original, full, inputs = prepared("Llama", "full")
    block = attnres.convert(original, "block", 1, example=inputs, eps=EPS)
    block.attnres.load_state_dict(full.attnres.state_dict())
    assert torch.equal(logits_of(block(**inputs)), logits_of(full(**inputs)))


@pytest.mark.parametrize(
    ("steps", "way"),
    [
        (5, "plain"),
        *(pytest.param(50, way, marks=pytest.mark.long) for way in ("plain", "checkpointed", "compiled")),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_trains_like_its_twin(name, steps, way):
    """Step after step every gradient is the twin's at the same weights."""
    family, original, model, inputs = prepared(name)
    model.attnres_size = 4
    run = {
        "plain": lambda: model,
        "checkpointed": lambda: checkpointed(model),
        "compiled": lambda: compiled(model, name),
    }
    run = run[way]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(run, inputs)
        found = assert_same_gradients(family, original, model, inputs, loss)
        named = [p for n, p in model.named_parameters() if not n.startswith("attnres.")]
        for parameter, gradient in zip([*named, *model.attnres.parameters()], found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * (0.5 if steps == 50 else 1)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_zero_queries_it_computes_what_it_did_and_reverting_undoes_it(name, kind):
    family = FAMILIES[name]
    model, inputs = family.seeded().eval(), family.inputs()
    before = logits_of(model(**inputs))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    residual, size = RESIDUALS[kind]
    assert attnres.convert(model, residual, size, example=inputs, eps=NEGLIGIBLE_EPS) is model
    assert not model.training
    tolerance = 1e-6
    assert ((logits_of(model(**inputs)) - before).norm() / before.norm()).item() < tolerance
    assert attnres.revert(model) is model
    assert torch.equal(logits_of(model(**inputs)), before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("attnres" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", RESIDUALS)
def test_reads_follow_the_protocol(kind):
    _, _, model, inputs = prepared("Llama", kind)
    seen = []
    for read in model.attnres.reads:
        read.register_forward_hook(
            lambda m, args, out: seen.append((len(args[0]), out[0].shape, len(out[1]), m.depth_sources))
        )
    model(**inputs)
    size = RESIDUALS[kind][1] or 1
    expected = [1 + -(-row // size) for row in range(7)]
    assert [count for count, *_ in seen] == expected
    for count, shape, rows, said in seen:
        assert (rows, said) == (count, count)
        assert shape == (2, 7, 16)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_every_output_can_be_seen_and_has_its_gradient(name, kind):
    """At the sublayer, or where its output becomes part of a stack, at `outputs`."""
    family, original, model, inputs = prepared(name, kind)
    size = RESIDUALS[kind][1] or 1
    seen = {}

    def see(layer):
        def hook(module, args, out):
            if first_tensor(out).ndim == 3:
                seen[layer] = first_tensor(out)

        return hook

    for layer, output in enumerate(model.attnres.outputs, 1):
        assert output.depth_output == layer
        output.register_forward_hook(see(layer))
    blocks = model.model.layers if name == "Llama" else model.vit.layers
    sublayers = [m for b in blocks for m in (b.self_attn if name == "Llama" else b.attention, b.mlp)]
    for layer, sublayer in enumerate(sublayers, 1):
        sublayer.register_forward_hook(see(layer))
    loss = loss_of(model, inputs)
    embedding, layers, head = family.parts(original, inputs)
    queries = [read.gain * read.query for read in model.attnres.reads]
    defined = definition.block(embedding, layers, queries, size, EPS)
    torch.testing.assert_close([seen[layer] for layer in range(1, 7)], defined.outputs, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(head(defined.final_state).square().mean(), defined.outputs)
    ours = torch.autograd.grad(loss, [seen[layer] for layer in range(1, 7)])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_with_a_cache_is_generation_without(name):
    _, _, model, inputs = prepared(name, dtype=torch.float32)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.eval().generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_copy_of_a_converted_model_is_its_own():
    _, _, model, inputs = prepared("Llama")
    twin = copy.deepcopy(model)
    before = logits_of(model(**inputs))
    assert torch.equal(logits_of(twin(**inputs)), before)
    with torch.no_grad():
        for read in twin.attnres.reads:
            read.query.zero_()
    assert not torch.equal(logits_of(twin(**inputs)), before)
    assert torch.equal(logits_of(model(**inputs)), before)
    attnres.revert(twin)
    assert torch.equal(logits_of(model(**inputs)), before)


@pytest.mark.parametrize("recomputes", [False, True])
def test_nothing_of_a_pass_outlives_it(recomputes):
    _, _, model, inputs = prepared("Llama", "full")
    if recomputes:
        checkpointed(model)
    seen = []
    for read in model.attnres.reads:
        read.register_forward_hook(lambda m, args, out: seen.extend(weakref.ref(x) for x in args[0]))
    loss_of(model, inputs).backward()
    gc.collect()
    assert len(seen) >= 28
    assert not any(source() is not None for source in seen)


def test_in_bfloat16_it_stays_near_float32():
    _, _, model, inputs = prepared("Llama", dtype=torch.float32)
    exact = logits_of(model(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = logits_of(model(**inputs))
    rounded = logits_of(model.bfloat16()(**inputs))
    for near in (autocast, rounded):
        assert 0 < ((near.float() - exact).norm() / exact.norm()).item() < 16 * 2**-8
