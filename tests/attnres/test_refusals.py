"""What convert refuses, naming the layer or the argument."""

import copy

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.blocks import WIDTH, Block, Holding, Stack, example, sharing, stack
from tests.attnres.families import DiT, dit_inputs, llama, vit

pytest.importorskip("transformers")


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


class DroppingBlock(Block):
    """Dropout between the layers and the stream, as a function that no hook sees."""

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + nn.functional.dropout(self.second(self.norm2(x)), 0.5, self.training)


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
    model = Holding(Block(), Block(), nn.Tanh(), Block())
    with pytest.raises(attnres.ConversionError, match=r"^parts\.3 is a stack .* beside the longest one"):
        attnres.convert(model, "full", example=example())


def test_a_list_with_a_block_of_another_kind_is_refused_as_it_would_stay_as_it_was():
    model = stack(Block, Block, Block)
    model.blocks[2] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    with pytest.raises(attnres.ConversionError, match=r"^blocks\.2 has no norm among its children"):
        attnres.convert(model, "full", example=example())


def test_dropout_that_no_hook_sees_is_taken_where_the_block_adds_up_by_itself_and_else_refused():
    attnres.convert(stack(Block, DroppingBlock, Block), "block", 2, example=example())
    with pytest.raises(attnres.ConversionError, match=r"^blocks\.2\.first does not receive"):
        attnres.convert(stack(Block, DroppingBlock, Block), "full", example=example())


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


def test_a_norm_of_several_layers_is_refused_by_the_names_of_two():
    says = r"^The norm of blocks\.1\.first, blocks\.1\.norm1, is that of blocks\.0\.first too"
    with pytest.raises(attnres.ConversionError, match=says):
        attnres.convert(sharing("norm1"), "block", 2, example=example())
    model = stack(Block, Block)
    model.blocks[1].norm2 = model.blocks[1].norm1
    with pytest.raises(attnres.ConversionError, match=r"^The norm of blocks\.1\.second, blocks\.1\.norm1"):
        attnres.convert(model, "full", example=example())
