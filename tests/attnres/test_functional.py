"""The paper's call, the module and the block to swap in, each against the definition."""

import pytest
import torch
from torch import nn

from attnres import AttnResBlock, DepthAttention, block_attn_res, definition, full_attn_res
from tests.attnres.models import lively_decoder, loss_of, tokens

WIDTH = 6


class OwnNorm(nn.Module):
    """An RMSNorm that somebody wrote, its gain around one as 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return definition.rms_norm(x, 1e-3) * (1 + self.weight)


def made(count: int, dtype=torch.float64):
    """Sources, a query and a norm, all random and all with gradients."""
    torch.manual_seed(count)
    sources = [torch.randn(2, 3, WIDTH, dtype=dtype, requires_grad=True) for _ in range(count)]
    proj, norm = nn.Linear(WIDTH, 1, bias=False).to(dtype), nn.RMSNorm(WIDTH, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    return sources, proj, norm


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_functional_form_is_the_definition(count):
    sources, proj, norm = made(count)
    parameters = [*sources, proj.weight, norm.weight]
    defined, _ = definition.depth_attention(proj.weight[0] * norm.weight, sources, 1e-3)
    theirs = torch.autograd.grad(defined.square().sum(), parameters)
    for ours in (block_attn_res(sources[:-1], sources[-1], proj, norm), full_attn_res(sources, proj, norm)):
        torch.testing.assert_close(ours, defined, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(ours.square().sum(), parameters)
        torch.testing.assert_close(gradients, theirs, rtol=1e-10, atol=1e-12)


def test_the_functional_form_passes_gradcheck():
    (one, two, three), proj, norm = made(3)

    def call(one, two, three, query, gain):
        held = nn.Linear(WIDTH, 1, bias=False), nn.RMSNorm(WIDTH, eps=1e-3)
        # A plain tensor may take the place of a parameter that is gone.
        del held[0].weight, held[1].weight
        held[0].weight, held[1].weight = query, gain
        return block_attn_res([one, two], three, *held)

    assert torch.autograd.gradcheck(call, (one, two, three, proj.weight, norm.weight))


def test_without_a_partial_sum_the_finished_blocks_are_read():
    sources, proj, norm = made(3)
    assert torch.equal(block_attn_res(sources, None, proj, norm), full_attn_res(sources, proj, norm))


def test_any_norm_will_do_for_the_keys():
    sources, proj, _ = made(3)
    norm = OwnNorm().double()
    defined, _ = definition.depth_attention(proj.weight[0] * (1 + norm.weight), sources, 1e-3)
    torch.testing.assert_close(full_attn_res(sources, proj, norm), defined)


def test_a_norm_without_gain_or_eps():
    sources, proj, _ = made(2)
    defined, _ = definition.depth_attention(proj.weight[0], sources, torch.finfo(torch.float64).eps)
    norm = nn.RMSNorm(WIDTH, elementwise_affine=False)
    torch.testing.assert_close(full_attn_res(sources, proj, norm), defined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_norm_without_eps_has_the_one_that_torch_gives_it(dtype):
    """In every dtype; seen where sources are so small that it counts."""
    torch.manual_seed(0)
    sources = [scale * torch.randn(1, 2, 64, dtype=dtype) for scale in (1.0, 1e-3)]
    proj, norm = nn.Linear(64, 1, bias=False).to(dtype), nn.RMSNorm(64).to(dtype)
    called = full_attn_res(sources, proj, lambda x: norm(x))
    torch.testing.assert_close(full_attn_res(sources, proj, norm), called)
    small = nn.RMSNorm(64, eps=torch.finfo(dtype).eps).to(dtype)
    if dtype in (torch.bfloat16, torch.float16):
        assert not torch.allclose(full_attn_res(sources, proj, small), called)


@pytest.mark.parametrize("any_norm", [False, True])
def test_bfloat16_sources_have_logits_of_float32(any_norm):
    sources, proj, norm = made(4)
    norm = OwnNorm().double() if any_norm else norm
    exact = full_attn_res(sources, proj, norm)
    rounded = full_attn_res(
        [source.bfloat16() for source in sources], proj.bfloat16(), norm.bfloat16() if any_norm else norm
    )
    assert rounded.dtype == torch.bfloat16
    assert ((rounded - exact).norm() / exact.norm()).item() < 6 * 2**-8


def test_a_read_on_its_own_is_the_definition():
    sources, proj, norm = made(4)
    read = DepthAttention(WIDTH, 4, eps=1e-3).double()
    with torch.no_grad():
        read.query.copy_(proj.weight[0])
        read.gain.copy_(norm.weight)
    defined = definition.depth_attention(read.gain * read.query, sources, 1e-3)
    torch.testing.assert_close(read(sources), defined)


def swapped(model, size):
    """The decoder's own layers in AttnResBlocks, with the decoder's queries."""
    config, reads = model.config, list(model.residual.reads)
    blocks = [
        AttnResBlock(
            block.attention_norm, block.attention, block.mlp_norm, block.mlp,
            width=config.width, index=index, layers_per_block=size, eps=config.norm_eps,
        )
        for index, block in enumerate(model.blocks)
    ]  # fmt: skip
    final = AttnResBlock.final_read(config.width, config.layers, size, config.norm_eps)
    own = [read for block in blocks for read in (block.attention_read, block.mlp_read)] + [final]
    assert [read.depth_sources for read in own] == [read.depth_sources for read in reads]
    for index, block in enumerate(blocks):
        block.attention_read, block.mlp_read = reads[2 * index], reads[2 * index + 1]
    return blocks, reads[-1]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 99])
def test_blocks_swapped_into_a_model_of_ones_own(size, checkpointed):
    model, inputs = lively_decoder(residual="block", layers_per_block=size), tokens()
    attnres_blocks, final_read = swapped(model, size)
    blocks, partial = [], model.embedding(inputs)
    for block in attnres_blocks:
        if checkpointed:
            blocks, partial = torch.utils.checkpoint.checkpoint(block, blocks, partial, use_reentrant=False)
        else:
            blocks, partial = block(blocks, partial)
    state, _ = final_read([*blocks, partial])
    logits = model.head(model.final_norm(state))
    expected = model(inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(loss_of(logits, inputs), list(model.parameters()))
    theirs = torch.autograd.grad(loss_of(expected, inputs), list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_extra_state_is_a_tensor_that_safetensors_can_keep():
    state = lively_decoder(residual="full").state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("size", [1, 3])
def test_partial_sums_under_autocast_are_kept_in_the_dtype_of_the_embedding(size):
    linear = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    parts = nn.RMSNorm(WIDTH), linear[0], nn.RMSNorm(WIDTH), linear[1]
    block = AttnResBlock(*parts, width=WIDTH, index=0, layers_per_block=size)
    with torch.autocast("cpu", torch.bfloat16):
        blocks, partial = block([], torch.randn(1, 2, WIDTH))
    # With Full an output is no sum: it stays as small as it came.
    assert partial.dtype == (torch.bfloat16 if size == 1 else torch.float32)
    assert blocks[0].dtype == torch.float32
