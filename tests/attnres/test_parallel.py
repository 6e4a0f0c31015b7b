"""Blocks whose layers run side by side are refused by name, however they are written; others that look like it are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attnres
from tests.attnres.blocks import WIDTH, Block, example, stack, zero_query_deviation
from tests.attnres.families import SIZES, token_inputs

pytest.importorskip("transformers")


class SharedDropoutBlock(Block):
    """Phi: two layers read one norm, and each passes a dropout."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm1(x)
        return x + self.dropout(self.first(h)) + self.dropout(self.second(h))


class ViewedBlock(Block):
    """GPT-NeoX, but each norm is given a tensor of its own."""

    def forward(self, x):
        return x + self.first(self.norm1(x)) + self.second(self.norm2(x.view_as(x)))


class DeepBlock(Block):
    """The second of two layers side by side is several modules, one of them a stranger to the state."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        made = self.first(h)
        made += x + self.down(F.gelu(self.up(h)))
        return made + self.second(self.norm2(made))


class ReshapingBlock(Block):
    """OPT: the second norm receives the tokens of all rows in one."""

    def forward(self, x):
        x, shape = x + self.first(self.norm1(x)), x.shape
        x = x.reshape(-1, WIDTH)
        return (x + self.second(self.norm2(x))).view(shape)


HAND_WRITTEN = [
    (SharedDropoutBlock, r"blocks\.1\.first and blocks\.1\.second run side by side"),
    (ViewedBlock, r"blocks\.1\.first and blocks\.1\.second run side by side"),
    (DeepBlock, r"blocks\.1\.first and blocks\.1\.up run side by side"),
    (ReshapingBlock, r"blocks\.1\.second reads what blocks\.1\.first added .* no norm"),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("kind", "says"), HAND_WRITTEN)
def test_layers_side_by_side_are_refused_by_name(kind, says, size):
    model = stack(Block, kind, Block)
    with pytest.raises(attnres.ConversionError, match=says) as caught:
        attnres.convert(model, "block", size, example=example())
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def small(name, **changes):
    import transformers

    config = getattr(transformers, f"{name}Config")(**changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


OLD_SIZES = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
NEW_SIZES = SIZES | {"num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
PARALLEL = {
    "GPT-J": lambda: small("GPTJ", **OLD_SIZES),
    "GPT-NeoX": lambda: small("GPTNeoX", **NEW_SIZES, use_parallel_residual=True),
    "Phi": lambda: small("Phi", **NEW_SIZES),
    "Falcon": lambda: small("Falcon", **NEW_SIZES, parallel_attn=True),
    "Falcon, two norms": lambda: small(
        "Falcon", **NEW_SIZES, new_decoder_architecture=True, num_kv_heads=2, parallel_attn=True
    ),
    "Cohere": lambda: small("Cohere", **NEW_SIZES),
    "StableLM": lambda: small("StableLm", **NEW_SIZES, num_key_value_heads=2, use_parallel_residual=True),
}
SEQUENTIAL = {
    "GPT-NeoX": lambda: small("GPTNeoX", **NEW_SIZES, use_parallel_residual=False),
    "Falcon": lambda: small("Falcon", **NEW_SIZES, parallel_attn=False, alibi=False),
    "StableLM": lambda: small("StableLm", **NEW_SIZES, num_key_value_heads=2, use_parallel_residual=False),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_models_of_others_are_refused_by_the_name_of_a_layer(name):
    with pytest.raises(
        attnres.ConversionError, match=r"\w+\.0\.\w+ .* parallel block: only blocks .*\.$"
    ) as caught:
        attnres.convert(PARALLEL[name](), "block", 2, example=token_inputs())
    assert "Build the model with such blocks" in str(caught.value)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_same_models_with_layers_one_after_the_other_are_taken(name):
    model = attnres.convert(SEQUENTIAL[name](), "full", example=token_inputs())
    assert len(model.attnres.reads) == 2 * 2 + 1


def post_norm_models():
    import transformers

    opt = {"ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    sizes = {key: value for key, value in NEW_SIZES.items() if key != "intermediate_size"}
    yield transformers.BertModel(transformers.BertConfig(**NEW_SIZES)), r"encoder\.layer\.0 has no norm"
    yield small("OPT", **sizes, **opt), r"decoder\.layers\.0\.self_attn reads the state without a norm"


def test_post_norm_models_of_others_are_refused_by_the_name_of_a_block():
    for model, says in post_norm_models():
        with pytest.raises(attnres.ConversionError, match=rf"{says}.* post-norm model.*: only PreNorm"):
            attnres.convert(model, "full", example=token_inputs())


class SpreadBlock(Block):
    """Queries, keys and values are the block's own children: three modules read one norm, and one joins the stream."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.first(F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h)))
        return x + self.second(self.norm2(x))


class GatedBlock(Block):
    """A child that reads the norm too opens and shuts the layer; another adds what it made of nothing."""

    def __init__(self):
        super().__init__()
        self.gate, self.shift = nn.Linear(WIDTH, WIDTH), nn.Embedding(1, WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.gate(h).sigmoid() * self.first(h) + self.shift(torch.zeros(1, dtype=torch.long))
        return x + self.second(self.norm2(x))


@pytest.mark.parametrize("kind", [SpreadBlock, GatedBlock])
def test_several_readers_of_one_norm_are_one_layer_where_they_are_not_added(kind):
    model = stack(Block, kind, Block)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-12
    assert zero_query_deviation(model, {"x": example()}, 2) < 1e-6


def test_a_tiny_state_still_has_its_norm_found():
    """Far below the eps of its norm, where twice the input gives nearly twice the output."""
    model = stack(Block, Block)
    attnres.convert(model, "full", example=example() * 1e-6)
    assert len(model.attnres.reads) == 5
