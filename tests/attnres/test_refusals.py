"""What convert refuses, naming the layer or the argument; and unusual models that it does take."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.families import DiT, DiTBlock, dit_inputs, gpt2, llama, logits_of, token_inputs, vit

pytest.importorskip("transformers")

WIDTH = 8


class Block(nn.Module):
    """A transformer block without attention; subclasses say how its parts are put together."""

    def __init__(self):
        super().__init__()
        self.norm1, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + self.second(self.norm2(x))


class PostNormBlock(Block):
    def forward(self, x):
        x = self.norm1(x + self.first(x))
        return self.norm2(x + self.second(x))


class ParallelBlock(Block):
    """GPT-NeoX: two norms read one state."""

    def forward(self, x):
        return x + self.first(self.norm1(x)) + self.second(self.norm2(x))


class OneNormBlock(Block):
    """GPT-J: two layers read one norm."""

    def forward(self, x):
        h = self.norm1(x)
        return x + self.first(h) + self.second(h)


class ScaledBlock(Block):
    """The state itself is scaled before the second layer."""

    def forward(self, x):
        x = 0.9 * x + self.first(self.norm1(x))
        return x + self.second(self.norm2(x))


class PeekingBlock(Block):
    """The second layer sees the state beside its norm."""

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + self.second(self.norm2(x) + 0.1 * x)


class NormAtTheEndBlock(Block):
    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return nn.functional.layer_norm(x + self.second(self.norm2(x)), (WIDTH,))


class StreamNormBlock(Block):
    """RWKV's first block: the stream goes on through a norm."""

    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return super().forward(self.before(x))


class AdaptiveNorm(nn.Module):
    """diffusers' adaLN-Zero: a norm that makes its own scale, shift and gate of a condition, by a matrix."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12, elementwise_affine=False)
        self.modulation = nn.Linear(1, 3 * WIDTH)

    def forward(self, x, condition):
        shift, scale, gate = self.modulation(condition).chunk(3, -1)
        return self.norm(x) * (1 + scale) + shift, gate


class AdaptiveBlock(Block):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(), AdaptiveNorm()

    def forward(self, x):
        for norm, layer in ((self.norm1, self.first), (self.norm2, self.second)):
            h, gate = norm(x, torch.ones(1))
            x = x + gate * layer(h)
        return x


class MixingNorm(nn.Module):
    """A norm and a layer in one: it does not tell which of both the stream needs."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(self.norm(x))


class MixingBlock(Block):
    def __init__(self):
        super().__init__()
        self.norm1 = MixingNorm()


class HalvingBlock(Block):
    """Multipliers between the layers and the stream."""

    def forward(self, x):
        x = x + 0.5 * self.first(self.norm1(x))
        return x + 0.25 * self.second(self.norm2(x))


class DroppingBlock(Block):
    """Dropout between the layers and the stream, as a function that no hook sees."""

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + nn.functional.dropout(self.second(self.norm2(x)), 0.5, self.training)


class Stack(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Holding(nn.Module):
    """Runs its parts one after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def example():
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def stack(*kinds):
    torch.manual_seed(0)
    return Stack(*kinds)


REFUSED = [
    ((PostNormBlock, PostNormBlock), r"blocks\.0\.first reads the state without a norm before it.*post-norm"),
    ((Block, ParallelBlock), r"blocks\.1\.norm2 reads the same state as the norm before it.*parallel block"),
    (
        (Block, OneNormBlock),
        r"blocks\.1\.first and blocks\.1\.second run side by side, as in a parallel block",
    ),
    ((Block, ScaledBlock), r"^blocks\.1\.second does not receive the embedding plus the sum"),
    ((Block, PeekingBlock, Block), r"through blocks\.1\.second|^blocks\.2\.first does not receive"),
    ((Block, StreamNormBlock), r"^blocks\.1\.before normalises the stream itself.*post-norm"),
    ((Block, NormAtTheEndBlock), r"^the final state does not receive the embedding plus the sum"),
    ((MixingBlock, Block), r"^blocks\.0\.norm1 reads the state without a norm before it"),
    ((Block,), r"blocks\.0 is the only transformer block"),
    ((), "No transformer blocks were found"),
]


@pytest.mark.parametrize(("kinds", "says"), REFUSED)
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_is_not_prenorm_is_refused_by_the_name_of_a_layer(kinds, says, size):
    model = stack(*kinds)
    state, hooks = copy.deepcopy(model.state_dict()), sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(attnres.ConversionError, match=says) as caught:
        attnres.convert(model, "block", size, example=example())
    assert "\n" not in str(caught.value)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks == 0
    assert model.state_dict().keys() == state.keys()


def test_a_second_stack_is_refused_as_it_would_stay_as_it_was():
    model = Holding(stack(Block, Block), stack(Block, Block, Block))
    with pytest.raises(
        attnres.ConversionError, match=r"^parts\.0\.blocks is a stack .* beside the longest one"
    ):
        attnres.convert(model, "full", example=example())
    attnres.convert(model.parts[0], "full", example=example())


def zero_query_deviation(model, inputs, size):
    model.eval()
    before = logits_of(model(**inputs))
    attnres.convert(model, "block", size, example=inputs, eps=1e-12)
    return ((logits_of(model(**inputs)) - before).norm() / before.norm()).item()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_multipliers_between_a_layer_and_the_stream_are_part_of_the_source(size):
    model = stack(Block, HalvingBlock, HalvingBlock)
    negligible_eps(model)
    assert zero_query_deviation(model, {"x": example()}, size) < 1e-6


def test_granites_residual_multiplier_is_part_of_the_source():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    rest = {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-12, "pad_token_id": None}
    model = GraniteForCausalLM(GraniteConfig(**sizes | rest, residual_multiplier=0.2))
    assert zero_query_deviation(model, token_inputs(), 1) < 1e-6


def test_a_sandwich_of_norms_is_part_of_the_source():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    rest = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-12}
    assert zero_query_deviation(Gemma2ForCausalLM(Gemma2Config(**sizes | rest)), token_inputs(), 1) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("make", [lambda: vit(hidden_dropout_prob=0.3), lambda: gpt2(resid_pdrop=0.3)])
def test_dropout_modules_are_part_of_the_source(make, size):
    torch.manual_seed(0)
    model = make()
    inputs = token_inputs() if hasattr(model, "transformer") else {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert zero_query_deviation(model, inputs, size) < 1e-6


def test_dropout_that_no_hook_sees_is_taken_where_the_block_adds_up_by_itself_and_else_refused():
    attnres.convert(stack(Block, DroppingBlock, Block), "block", 2, example=example())
    with pytest.raises(attnres.ConversionError, match=r"^blocks\.2\.first does not receive"):
        attnres.convert(stack(Block, DroppingBlock, Block), "full", example=example())


def negligible_eps(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-12
    return model


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_norm_that_makes_its_scale_of_a_condition(size):
    model = negligible_eps(stack(AdaptiveBlock, Block, AdaptiveBlock))
    assert zero_query_deviation(model, {"x": example()}, size) < 1e-6


def test_blocks_between_other_modules_of_a_list():
    norm = nn.LayerNorm(WIDTH)
    model = negligible_eps(Holding(nn.Linear(WIDTH, WIDTH), Block(), Block(), Block(), norm))
    assert zero_query_deviation(model, {"x": example()}, 3) < 1e-6
    assert len(model.attnres.reads) == 7


class Named(nn.Module):
    """Its blocks are in a dict that holds the whole model, as nanoGPT's, and in one by their numbers, as torchtitan's."""

    def __init__(self):
        super().__init__()
        blocks = nn.ModuleDict({str(index): Block() for index in range(3)})
        self.transformer = nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(WIDTH)})
        self.left_out = ()

    def forward(self, x):
        for name, block in self.transformer.blocks.items():
            x = x if name in self.left_out else block(x)
        return self.transformer.norm(x)


def test_blocks_in_dicts():
    model = negligible_eps(Named())
    assert zero_query_deviation(model, {"x": example()}, 4) < 1e-6
    model.left_out = ("2",)
    with pytest.raises(RuntimeError, match=r"transformer\.blocks\.2 was left out"):
        model(example())


def test_a_tokenizers_batch_is_an_example():
    from transformers import BatchEncoding

    attnres.convert(llama(), "full", example=BatchEncoding(token_inputs()))


@pytest.mark.parametrize("size", [1, 2])
def test_torchs_own_prenorm_encoder(size):
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True, layer_norm_eps=1e-12)
    norm = nn.LayerNorm(16, eps=1e-12)
    model = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)
    assert zero_query_deviation(model, {"src": torch.randn(2, 5, 16)}, size) < 1e-6


def test_the_example_leaves_no_trace():
    model = stack(Block, Block)
    model.blocks[0].first = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(WIDTH, WIDTH))
    model.eval()
    model.blocks[1].train()
    before, draw = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attnres.convert(model, "block", 2, example=example())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), draw)
    assert [module.training for module in model.blocks] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_example_is_asked_for_where_the_model_brings_none():
    with pytest.raises(ValueError, match="example must be an input"):
        attnres.convert(DiT(), "full")
    with pytest.raises(ValueError, match="does not run on its own dummy_inputs: pass an example"):
        attnres.convert(vit(), "full")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"hidden_size": 32}])
def test_weights_of_another_depth_or_width_are_refused_in_one_sentence(changes, tmp_path):
    attnres.convert(llama(), "block", 2).save_pretrained(tmp_path)
    other = llama(**changes)
    with pytest.raises(ValueError, match="another depth, width or residual") as caught:
        attnres.convert(other, "block", 2, weights=tmp_path)
    assert "\n" not in str(caught.value)
    assert not hasattr(other, "attnres")


def test_converting_twice_and_reverting_nothing_are_refused(tmp_path):
    model = attnres.convert(llama(), "full")
    with pytest.raises(ValueError, match="revert it before"):
        attnres.convert(model, "full")
    attnres.revert(model)
    with pytest.raises(ValueError, match="was not converted"):
        attnres.revert(model)
    with pytest.raises(ValueError, match="no safetensors file"):
        attnres.convert(model, "full", weights=tmp_path)


def test_a_block_called_by_itself_says_why_it_cannot():
    model = attnres.convert(DiT(), "full", example=dit_inputs())
    with pytest.raises(RuntimeError, match=r"blocks\.1 was given a state without its sources"):
        model.blocks[1](torch.randn(2, 5, 16), torch.randn(2, 16))


def test_a_block_called_twice_is_refused():
    class Looped(Stack):
        def forward(self, x):
            return super().forward(super().forward(x))

    with pytest.raises(attnres.ConversionError, match=r"blocks\.0 is called 2 times"):
        attnres.convert(Looped(Block, Block), "full", example=example())


def sharing(*names):
    """Three blocks that share these parts."""
    model = stack(Block, Block, Block)
    for block in model.blocks[1:]:
        for name in names:
            setattr(block, name, getattr(model.blocks[0], name))
    return model


def test_a_norm_of_several_layers_is_refused_by_the_names_of_two():
    says = r"^The norm of blocks\.1\.first, blocks\.1\.norm1, is that of blocks\.0\.first too"
    with pytest.raises(attnres.ConversionError, match=says):
        attnres.convert(sharing("norm1"), "block", 2, example=example())
    model = stack(Block, Block)
    model.blocks[1].norm2 = model.blocks[1].norm1
    with pytest.raises(attnres.ConversionError, match=r"^The norm of blocks\.1\.second, blocks\.1\.norm1"):
        attnres.convert(model, "full", example=example())


@pytest.mark.parametrize(("size", "first"), [(1, 0), (3, 1)])
def test_a_sublayer_of_several_blocks_is_taken_where_they_add_up_by_themselves(size, first):
    model = sharing("first")
    negligible_eps(model)
    says = rf"^blocks\.{first}\.first ends in .* part of blocks\.0 and blocks\.1 and blocks\.2.* multiple of 2\.$"
    with pytest.raises(attnres.ConversionError, match=says):
        attnres.convert(model, "block", size, example=example())
    assert zero_query_deviation(model, {"x": example()}, 2) < 1e-6


class Handed(NamedTuple):
    state: torch.Tensor
    count: int


class NamedBlock(Block):
    def forward(self, x):
        return Handed(super().forward(x.state if isinstance(x, Handed) else x), 1)


class NamedStack(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x).state
        return self.norm(x)


def test_a_block_may_hand_on_a_named_tuple():
    model = NamedStack(NamedBlock, NamedBlock)
    negligible_eps(model)
    assert zero_query_deviation(model, {"x": example()}, 1) < 1e-6


class QuantisedBlock(Block):
    """Its first parameter is of whole numbers, as those of quantised models."""

    def __init__(self):
        super().__init__()
        ours, self._parameters = self._parameters, {}
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self._parameters |= ours


class BareBlock(nn.Module):
    """Without parameters."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.GELU()

    def forward(self, x):
        return x + self.layer(self.norm(x))


@pytest.mark.parametrize("kind", [QuantisedBlock, BareBlock])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_have_the_dtype_of_the_stream(kind, dtype):
    model = Stack(kind, kind).to(dtype)
    attnres.convert(model, "full", example=example().to(dtype))
    assert {parameter.dtype for parameter in model.attnres.parameters()} == {dtype}


def test_a_conversion_in_inference_mode_can_be_trained():
    model, inputs = stack(Block, Block), example()
    with torch.inference_mode():
        attnres.convert(model, "full", example=inputs)
    model(example()).square().sum().backward()
    assert model.attnres.reads[-1].query.grad.any()


def test_the_random_numbers_of_a_gpu_are_left_alone():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA here")
    model = stack(Block, Block).cuda()
    before = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnres.convert(model, "full", example=example())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_state_passed_by_keyword():
    class Named(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = block(x=x)
            return self.norm(x)

    model = Named(Block, Block, Block)
    negligible_eps(model)
    assert zero_query_deviation(model, {"x": example()}, 3) < 1e-6


def test_a_gate_of_the_condition_is_part_of_the_source():
    """Verified on a DiT whose gates are far from one."""
    model = DiT()
    for block in model.blocks:
        assert isinstance(block, DiTBlock)
        nn.init.normal_(block.modulation[1].bias)
    assert zero_query_deviation(model, dit_inputs(), 1) < 1e-6
