"""Models of others with AttnRes put in: against twins by hand, and undone."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import attnres
from attnres import definition
from attnres.watching import first_tensor
from tests.attnres.families import FAMILIES, LANGUAGE, NEGLIGIBLE_EPS, DiT, logits_of

pytest.importorskip("transformers")

RESIDUALS = {
    "full": ("full", None),
    "block of 2": ("block", 2),
    "block of 3, across transformer blocks": ("block", 3),
    "block of 4, ragged": ("block", 4),
}
EPS = 1e-6


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(name, kind="block of 4, ragged", dtype=torch.float64, **changes):
    """A family, an unconverted model, the converted one with random queries, and inputs."""
    family = FAMILIES[name]
    original = family.seeded(**changes).to(dtype).train()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in family.inputs().items()}
    residual, size = RESIDUALS[kind]
    model = attnres.convert(copy.deepcopy(original), residual, size, example=inputs, eps=EPS)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
            read.gain.add_(torch.randn_like(read.gain), alpha=0.2)
    return family, original, model, inputs


def loss_of(model, inputs):
    return logits_of(model(**inputs)).square().mean()


def gradients(loss, parameters):
    """Zeros where nothing reaches a parameter: an expert that no token went to."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_same_gradients(family, original, model, inputs, loss):
    """Every gradient of the converted model at its weights, and the twin's."""
    shared = {name: p for name, p in model.named_parameters() if not name.startswith("attnres.")}
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.copy_(shared[name])
    queries = [read.gain * read.query for read in model.attnres.reads]
    defined = family.twin(original, inputs, queries, model.attnres_size, EPS).square().mean()
    tolerance = 3e-5 if family.norms_in_float32 else 1e-9
    torch.testing.assert_close(loss, defined, rtol=tolerance, atol=0)
    reads = list(model.attnres.parameters())
    ours = gradients(loss, [*shared.values(), *reads])
    theirs = gradients(defined, [*(dict(original.named_parameters())[name] for name in shared), *reads])
    names = [*shared, *(name for name, _ in model.attnres.named_parameters())]
    largest = max(gradient.norm() for gradient in theirs)
    for name, one, other in zip(names, ours, theirs, strict=True):
        difference = (one - other).norm()
        assert difference <= tolerance * other.norm() + 0.01 * tolerance * largest, f"{name}: {difference}"
    return ours


def checkpointed(model, reentrant=False):
    """The model with every transformer block under checkpointing, and no cache, which that does not go with."""
    if isinstance(model, DiT):
        model.checkpointing = {"use_reentrant": reentrant}
        return model
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    return model


def checked(name, kind, change=lambda model: model):
    family, original, model, inputs = prepared(name, kind)
    model.attnres_size = RESIDUALS[kind][1] or 1
    return assert_same_gradients(family, original, model, inputs, loss_of(change(model), inputs))


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


def compiled(model, name, recomputes=False, backend="aot_eager"):
    torch._dynamo.reset()
    # Experts and delta attention break the graph by themselves; inside a checkpoint it breaks where ViT's calls of one
    # dropout are told apart, and at hooks on a block, which DiT's author has inside.
    broken = name in ("Kimi Linear", "DeepSeek-V3") or (name in ("ViT", "DiT") and recomputes)
    return torch.compile(model, backend=backend, fullgraph=not broken)


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


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients(name, kind):
    checked(name, kind, checkpointed)


def test_checkpointed_inside_the_blocks_own_forward():
    _, _, model, inputs = prepared("DiT", "block of 3, across transformer blocks")
    plain = gradients(loss_of(model, inputs), list(model.parameters()))
    for block in model.blocks:
        call = block.forward
        block.forward = lambda *args, f=call: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    checkpointed = gradients(loss_of(model, inputs), list(model.parameters()))
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_reentrant_checkpointing_is_refused(name):
    _, _, model, inputs = prepared(name)
    checkpointed(model, reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        loss_of(model, inputs).backward()


def test_an_embedding_that_requires_gradients_does_not_keep_it_from_running_without_any():
    """As under transformers' enable_input_require_grads, which fine-tuning of adapters switches on."""
    _, _, model, inputs = prepared("Llama")
    expected = logits_of(model(**inputs)).detach()
    model.enable_input_require_grads()
    with torch.no_grad():
        assert torch.equal(logits_of(model(**inputs)), expected)


class Unrecorded(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.block(*args, **kwargs)


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_alone_runs_without_gradients_is_refused(index):
    """The queries' gradients would be lost, all of them where it is the first block."""
    _, _, model, inputs = prepared("Llama", "block of 2")
    model.model.embed_tokens.requires_grad_(False)
    block = model.model.layers[index]
    assert logits_of(model(**inputs)).requires_grad
    model.model.layers[index] = Unrecorded(block)
    with pytest.raises(RuntimeError, match="gradients of sources and queries would be lost"):
        model(**inputs)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_two_forwards_before_their_backwards(kind, recomputes):
    _, _, model, inputs = prepared("Llama", kind)
    if recomputes:
        checkpointed(model)
    parameters, other = list(model.parameters()), {"input_ids": inputs["input_ids"].flip(1)[:1, :5]}
    alone = [gradients(loss_of(model, x), parameters) for x in (inputs, other)]
    losses = [loss_of(model, x) for x in (inputs, other)]
    together = [gradients(loss, parameters) for loss in losses]
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


COMPILED = [("Llama", "block of 4, ragged", True)]
COMPILED_LONG = [
    (name, kind, recomputes)
    for name in FAMILIES
    for kind in ("full", "block of 3, across transformer blocks", "block of 4, ragged")
    for recomputes in (False, True)
    if (name, kind, recomputes) not in COMPILED
]


@pytest.mark.parametrize(
    ("name", "kind", "recomputes"),
    [*COMPILED, *(pytest.param(*case, marks=pytest.mark.long) for case in COMPILED_LONG)],
)
def test_compiled_gradients(name, kind, recomputes):
    """DiT's checkpointing is its author's own call of `checkpoint(block, ...)`."""
    checked(name, kind, lambda m: compiled(checkpointed(m) if recomputes else m, name, recomputes))


@pytest.mark.parametrize("tokens", [7, pytest.param(40, marks=pytest.mark.long)])
def test_compiled_without_gradients(tokens):
    """As in generation, where a few tokens take other sums than many."""
    _, _, model, inputs = prepared("Llama", "block of 3, across transformer blocks")
    inputs = {"input_ids": inputs["input_ids"].repeat(1, 6)[:, :tokens]}
    with torch.no_grad():
        expected = logits_of(model(**inputs))
        torch.testing.assert_close(
            logits_of(compiled(model, "Llama")(**inputs)), expected, rtol=1e-5, atol=1e-7
        )


def test_a_checkpointed_block_is_one_graph_where_the_compiler_is_told_that_it_may():
    torch._dynamo.reset()
    whole = lambda model: torch.compile(checkpointed(model), backend="aot_eager", fullgraph=True)  # noqa: E731
    # pytest's monkeypatch would delete the setting afterwards.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        checked("DiT", "block of 3, across transformer blocks", whole)


@pytest.mark.long
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "DiT"])
def test_gradients_of_machine_code(name, recomputes):
    kind = "block of 3, across transformer blocks"
    checked(
        name, kind, lambda m: compiled(checkpointed(m) if recomputes else m, name, recomputes, "inductor")
    )


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_compiled_forwards_before_their_backwards(recomputes):
    _, _, model, inputs = prepared("Llama", "block of 3, across transformer blocks")
    parameters, other = list(model.parameters()), {"input_ids": inputs["input_ids"].flip(1)}
    alone = [gradients(loss_of(model, x), parameters) for x in (inputs, other)]
    run = compiled(checkpointed(model) if recomputes else model, "Llama")
    losses = [loss_of(run, x) for x in (inputs, other)]
    together = [gradients(loss, parameters) for loss in losses]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_with_a_cache_is_generation_without(name):
    _, _, model, inputs = prepared(name, dtype=torch.float32)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.eval().generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("Llama", "GPT-2", "ViT") else pytest.param(name, marks=pytest.mark.long)
        for name in FAMILIES
        if name != "DiT"
    ],
)
def test_saved_and_loaded_with_save_pretrained(name, tmp_path):
    _, _, model, inputs = prepared(name, dtype=torch.float32)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded, "block", 4, example=inputs, weights=tmp_path)
    assert loaded.attnres.reads[0].eps == EPS  # as it was saved
    assert torch.equal(logits_of(loaded.eval()(**inputs)), logits_of(model(**inputs)))
    another = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another residual or layers_per_block"):
        attnres.convert(another, "block", 2, example=inputs, weights=tmp_path)
    with pytest.raises(ValueError, match=f"was saved with eps={EPS:g}: give the same eps, or none"):
        attnres.convert(another, "block", 4, example=inputs, eps=0.5, weights=tmp_path)
    assert not hasattr(another, "attnres")


@pytest.fixture
def inner():
    """A language model that was converted by its inner module alone, and inputs."""
    family = FAMILIES["Llama"]
    model, inputs = family.seeded().eval(), family.inputs()
    attnres.convert(model.model, "block", 4, example=inputs, eps=1e-5)
    with torch.no_grad():
        for read in model.model.attnres.reads:
            read.query.normal_()
    return model, inputs


def outputs_of(model, inputs):
    return logits_of(model.eval()(**inputs))


@pytest.mark.parametrize("part", ["model", ""])
def test_a_part_converted_is_saved_with_the_whole_and_taken_back_by_either(inner, part, tmp_path):
    model, inputs = inner
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded.get_submodule(part), "block", 4, example=inputs, weights=tmp_path)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_a_whole_converted_is_taken_back_by_a_part(tmp_path):
    _, _, model, inputs = prepared("Llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded.model, "block", 4, example=inputs, weights=tmp_path)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_a_converted_model_is_kept_by_torch_save_whole_or_by_its_state_dict(inner, tmp_path):
    model, inputs = inner
    expected = outputs_of(model, inputs)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(outputs_of(whole, inputs), expected)
    attnres.revert(whole.model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    again = FAMILIES["Llama"].seeded()
    attnres.convert(again.model, "block", 4, example=inputs, eps=1e-5)
    again.load_state_dict(state)
    assert torch.equal(outputs_of(again, inputs), expected)


def test_a_state_dict_of_another_eps_or_size_is_refused(inner):
    model, inputs = inner
    for size, eps, says in (
        (4, 1e-6, "^eps: .* convert the model with eps=1e-05"),
        (2, 1e-5, "layers_per_block"),
    ):
        other = FAMILIES["Llama"].seeded()
        attnres.convert(other.model, "block", size, example=inputs, eps=eps)
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(model.state_dict())


def test_what_was_converted_in_part_is_not_converted_or_reverted_as_a_whole(inner):
    model, _ = inner
    with pytest.raises(ValueError, match="was converted already, by model: revert that"):
        attnres.convert(model, "full")
    with pytest.raises(ValueError, match="its part model was: pass the module"):
        attnres.revert(model)
    attnres.revert(model.model)
    attnres.convert(model, "full")
    with pytest.raises(ValueError, match="was converted already, by a module that holds it"):
        attnres.convert(model.model, "full")


def test_weights_of_two_converted_models_in_one_folder_are_refused(inner, tmp_path):
    model, _ = inner
    pair = nn.ModuleDict({"one": model, "two": copy.deepcopy(model)})
    save_file(
        {name: x.contiguous() for name, x in pair.state_dict().items() if "attnres" in name},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match=r"several converted modules, one\.model, two\.model"):
        attnres.convert(FAMILIES["Llama"].seeded(), "block", 4, weights=tmp_path)


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
