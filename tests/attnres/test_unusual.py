"""Unusual models that convert takes, and what it leaves as it was."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.blocks import (
    WIDTH,
    Block,
    Holding,
    Stack,
    example,
    negligible_eps,
    sharing,
    stack,
    zero_query_deviation,
)
from tests.attnres.families import DiT, DiTBlock, dit_inputs, gpt2, llama, token_inputs, vit

pytest.importorskip("transformers")


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


class HalvingBlock(Block):
    """Multipliers between the layers and the stream."""

    def forward(self, x):
        x = x + 0.5 * self.first(self.norm1(x))
        return x + 0.25 * self.second(self.norm2(x))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_multipliers_between_a_layer_and_the_stream_are_part_of_the_source(size):
    model = stack(Block, HalvingBlock, HalvingBlock)
    negligible_eps(model)
    assert zero_query_deviation(model, {"x": example()}, size) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("make", [lambda: vit(hidden_dropout_prob=0.3), lambda: gpt2(resid_pdrop=0.3)])
def test_dropout_modules_are_part_of_the_source(make, size):
    torch.manual_seed(0)
    model = make()
    inputs = token_inputs() if hasattr(model, "transformer") else {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert zero_query_deviation(model, inputs, size) < 1e-6


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
