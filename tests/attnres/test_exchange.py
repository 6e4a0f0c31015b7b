"""After a conversion: modules exchanged, adapters put in, blocks left out. Right, or one sentence; never in silence."""

import copy

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.blocks import WIDTH, Block, Stack, example, stack
from tests.attnres.converted import compiled, prepared
from tests.attnres.families import logits_of

pytest.importorskip("transformers")


class Adapter(nn.Module):
    """What PEFT's LoRA puts in the place of a Linear: the frozen layer and beside it two small matrices."""

    def __init__(self, base_layer):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        out_width, width = base_layer.weight.shape
        self.base_layer = base_layer.requires_grad_(False)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator).to(base_layer.weight))  # noqa: E731
        self.a, self.b = draw(2, width), draw(out_width, 2)

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def adapt(module, *names):
    """An adapter in the place of each Linear of these names, wherever it is."""
    for parent in [*module.modules()]:
        for name in names:
            if isinstance(getattr(parent, name, None), nn.Linear):
                setattr(parent, name, Adapter(getattr(parent, name)))
    return module


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_adapters_inside_the_sublayers_may_come_before_or_after(kind):
    _, original, late, inputs = prepared("Llama", kind)
    residual, size = ("full", None) if kind == "full" else ("block", 4)
    early = attnres.convert(adapt(original, "q_proj", "down_proj"), residual, size, example=inputs)
    early.attnres.load_state_dict(late.attnres.state_dict())
    adapt(late, "q_proj", "down_proj")
    found = []
    for model in (early, late):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum(".a" in name for name in parameters) == 6
        loss = logits_of(model(**inputs)).square().mean()
        found.append(
            [loss, dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))]
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def converted(residual="full", size=None, blocks=3):
    model = attnres.convert(stack(*[Block] * blocks), residual, size, example=example())
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
    return model


class Kept(nn.Module):
    """What PEFT's `modules_to_save` puts in the place of a module: the frozen one, and a copy that is trained and used."""

    def __init__(self, module):
        super().__init__()
        self.original, self.trained = module.requires_grad_(False), copy.deepcopy(module).requires_grad_()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.trained, name)


def test_a_copy_of_the_reads_in_their_place_is_what_reads():
    _, _, model, inputs = prepared("Llama")
    before = logits_of(model(**inputs))
    model.attnres = Kept(model.attnres)
    assert sum(1 for _ in model.attnres.trained.modules()) < 20
    loss = logits_of(model(**inputs)).square().mean()
    loss.backward()
    assert all(read.query.grad.any() for read in model.attnres.trained.reads[1:])
    with torch.no_grad():
        model.attnres.trained.reads[3].query.zero_()
    assert not torch.equal(logits_of(model(**inputs)), before)
    attnres.revert(model)
    assert not any("attnres" in name for name in model.state_dict())


def test_an_adapter_in_the_place_of_a_sublayer_counts_where_the_block_adds_up_by_itself():
    late, early = converted("block", 2), adapt(stack(Block, Block, Block), "first")
    attnres.convert(early, "block", 2, example=example())
    early.attnres.load_state_dict(late.attnres.state_dict())
    before = late(example())
    assert torch.equal(adapt(late, "first")(example()), early(example()))
    assert not torch.equal(late(example()), before)


EXCHANGES = {
    "blocks.1.norm2": lambda model: setattr(model.blocks[1], "norm2", nn.LayerNorm(WIDTH)),
    "blocks.0.norm1": lambda model: setattr(model.blocks[0], "norm1", nn.Identity()),
    "blocks.1.first": lambda model: adapt(model.blocks[1], "first"),
    "blocks.2.second": lambda model: model.blocks[2].register_module("second", nn.Linear(WIDTH, WIDTH)),
}


@pytest.mark.parametrize(
    ("name", "compiles"), [*((name, False) for name in EXCHANGES), ("blocks.1.norm2", True)]
)
def test_an_exchanged_module_is_refused_by_name_at_the_next_forward(name, compiles):
    model = converted()
    run = compiled(model, "plain") if compiles else model
    run(example())
    EXCHANGES[name](model)
    with pytest.raises(Exception, match=rf"{name} was exchanged after the conversion") as caught:
        run(example())
    if not compiles:
        assert type(caught.value) is RuntimeError and "\n" not in str(caught.value)


def test_what_the_refusal_says_to_do_keeps_what_the_reads_have_learnt():
    model, twin = converted(), converted()
    twin.load_state_dict(model.state_dict())
    kept = model.attnres.state_dict()
    attnres.revert(model)
    model.blocks[1].norm2 = nn.LayerNorm(WIDTH)  # the same function as the one it replaces
    attnres.convert(model, "full", example=example())
    model.attnres.load_state_dict(kept)
    assert torch.equal(model(example()), twin(example()))


def test_a_part_that_carries_no_hook_may_be_exchanged():
    model = converted("block", 2)
    model.blocks[0].second = nn.Linear(WIDTH, WIDTH)
    model.norm = nn.Identity()
    assert model(example()).isfinite().all()


class Dropping(Stack):
    """Leaves out the blocks of these numbers, in training."""

    left_out = ()

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if not (self.training and index in self.left_out):
                x = block(x)
        return self.norm(x)


LEFT_OUT = [
    (residual, size, index, False)
    for residual, size in (("full", None), ("block", 2), ("block", 4))
    for index in (0, 1, 2)
]


@pytest.mark.parametrize(("residual", "size", "index", "compiles"), [*LEFT_OUT, ("block", 4, 2, True)])
def test_a_block_left_out_of_a_pass_is_refused_by_name(residual, size, index, compiles):
    """LayerDrop, when it strikes after the conversion."""
    model = attnres.convert(Dropping(Block, Block, Block), residual, size, example=example())
    model.left_out = (index,)
    says = (
        "blocks.1 was given a state without its sources.* left out"
        if index == 0
        else rf"blocks.{index} was left out"
    )
    run = torch.compile(model, backend="eager") if compiles else model
    with pytest.raises(RuntimeError, match=says) as caught:
        run(example())
    assert "\n" not in str(caught.value)
    assert model.eval()(example()).isfinite().all()


class Skipping(Block):
    """Leaves out a layer of these numbers, or runs one that it did not have."""

    left_out, adds = (), False

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for index, (norm, layer) in enumerate(((self.norm1, self.first), (self.norm2, self.second))):
            if index not in self.left_out:
                x = x + layer(norm(x))
        return x + self.extra(x) if self.adds else x


@pytest.mark.parametrize(("left_out", "name"), [((0,), "first"), ((1,), "second"), ((0, 1), "first")])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_layer_left_out_of_a_pass_is_refused_by_name(size, left_out, name):
    model = attnres.convert(stack(Skipping, Skipping, Skipping), "block", size, example=example())
    model.blocks[1].left_out = left_out
    with pytest.raises(RuntimeError, match=rf"^blocks\.1\.{name} did not run in its place [^\n]*\.$"):
        model(example())
    model.blocks[1].left_out = ()
    assert model(example()).isfinite().all()


@pytest.mark.parametrize("size", [1, 2])
def test_a_part_that_did_not_run_on_the_example_is_refused_by_name(size):
    """What it adds to the stream may be a layer that nobody reads for, as cross-attention is."""
    model = attnres.convert(stack(Skipping, Skipping), "block", size, example=example())
    model.blocks[1].adds = True
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.extra did not run on the example [^\n]*\.$"):
        model(example())


def test_a_part_that_ran_in_another_block_may_run_in_any():
    model = stack(Skipping, Skipping, Skipping)
    shared = model.blocks[0].extra
    for block in model.blocks:
        block.extra = shared
    model.blocks[0].extra = nn.Identity()
    model.blocks[1].extra, model.blocks[1].adds = shared, False
    model.blocks[2].second = shared
    attnres.convert(model, "block", 2, example=example())
    assert model(example()).isfinite().all()


def test_a_block_left_out_while_converting_is_refused_by_name():
    model = Dropping(Block, Block, Block)
    model.left_out = (1,)
    with pytest.raises(
        attnres.ConversionError, match=r"blocks\.1 was left out .* set the model's layerdrop to 0"
    ):
        attnres.convert(model, "full", example=example())


def test_layerdrop_of_others_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 6,
    }
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, layerdrop=0.5))
    with pytest.raises(attnres.ConversionError, match=r"layers\.\d was left out .* layerdrop to 0"):
        attnres.convert(model, "full", example={"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_an_exchanged_block_is_noticed():
    for index, says in ((1, r"blocks\.1 was left out"), (2, r"blocks\.2 was left out")):
        model = converted("block", 4)
        model.blocks[index] = nn.Identity()
        with pytest.raises(RuntimeError, match=says):
            model(example())
    model = converted()
    model.blocks[1] = Block()
    with pytest.raises(RuntimeError, match=r"blocks\.2 was given a state without its sources.*exchanged"):
        model(example())


def test_an_error_in_a_pass_leaves_nothing_open():
    model = converted()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, WIDTH + 1))
    assert model(example()).isfinite().all()
