"""Models of others that the named families do not cover: taken exactly, or refused for the right reason."""

import copy

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.converted import EPS, assert_same_gradients, checkpointed
from tests.attnres.families import (
    NEGLIGIBLE_EPS,
    SIZES,
    Family,
    image_inputs,
    llama_parts,
    logits_of,
    token_inputs,
)

transformers = pytest.importorskip("transformers")

NORMS = ("eps", "variance_epsilon")
LANGUAGE = SIZES | {
    "num_hidden_layers": 3, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "experts_implementation": "eager",
}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
WHISPER = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
    "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
}  # fmt: skip


def made(name: str, kind: str, **config) -> nn.Module:
    """A model of transformers, in evaluation mode, its norms with a negligible eps."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**config)).eval()
    for module in model.modules():
        for field in NORMS:
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, NEGLIGIBLE_EPS)
    return model


def causal(name: str, **config) -> nn.Module:
    return made(name, f"{name}ForCausalLM", **LANGUAGE | config)


def whisper() -> nn.Module:
    return made("Whisper", "WhisperModel", **WHISPER)


def whisper_decoder() -> nn.Module:
    return whisper().decoder


def heard() -> dict:
    """A text with what it was heard from, for cross-attention."""
    states = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(4))
    return token_inputs() | {"encoder_hidden_states": states}


TAKEN = {
    "Phi-3": (lambda: causal("Phi3"), token_inputs),
    "Qwen2-MoE": (lambda: causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=8), token_inputs),
    "Gemma 2": (lambda: causal("Gemma2", head_dim=8), token_inputs),
    "Granite": (lambda: causal("Granite", residual_multiplier=0.2, pad_token_id=None), token_inputs),
    "Mixtral": (lambda: causal("Mixtral", **EXPERTS), token_inputs),
    "Llama 4": (
        lambda: made("Llama4Text", "Llama4ForCausalLM", **LANGUAGE | EXPERTS, intermediate_size_mlp=32, head_dim=8),
        token_inputs,
    ),
    "Jamba": (lambda: causal("Jamba", **EXPERTS, mamba_d_state=4, mamba_dt_rank=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False), token_inputs),
    "ModernBERT": (
        lambda: made("ModernBert", "ModernBertModel", **LANGUAGE, cls_token_id=1, sep_token_id=2),
        token_inputs,
    ),
    "DINOv2": (
        lambda: made(
            "Dinov2", "Dinov2Model", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_inputs,
    ),
}  # fmt: skip


def states_of(output: object) -> torch.Tensor:
    return getattr(output, "last_hidden_state", None) if not hasattr(output, "logits") else logits_of(output)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", TAKEN)
def test_with_zero_queries_it_computes_what_it_did(name, size):
    make, inputs = TAKEN[name]
    model, given = make(), inputs()
    before = states_of(model(**given))
    attnres.convert(model, "block", size, example=given, eps=NEGLIGIBLE_EPS)
    assert ((states_of(model(**given)) - before).norm() / before.norm()).item() < 1e-6


def gemma_parts(model, inputs):
    """A norm before and after each sublayer, and an embedding that is scaled."""
    base, layers = model.model, []
    x = base.embed_tokens(inputs["input_ids"])
    position = torch.arange(x.shape[1]).unsqueeze(0)
    for block, kind in zip(base.layers, base.config.layer_types, strict=True):
        options = {"attention_mask": None, "position_embeddings": base.rotary_emb(x, position, kind)}
        layers.append(
            lambda h, b=block, o=options: b.post_attention_layernorm(
                b.self_attn(b.input_layernorm(h), **o)[0]
            )
        )
        layers.append(lambda h, b=block: b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(h))))
    return x, layers, lambda h: model.lm_head(base.norm(h))


def t5_parts(model, inputs):
    """Blocks that are lists of layers, each with its own norm."""
    encoder, layers = model.encoder, []
    x = encoder.embed_tokens(inputs["input_ids"])
    first = encoder.block[0].layer[0].SelfAttention
    bias = first.compute_bias(x.shape[1], x.shape[1])
    for block in encoder.block:
        attention, mlp = block.layer
        layers.append(
            lambda h, a=attention: a.SelfAttention(
                a.layer_norm(h), mask=torch.zeros(1, 1, 1, 1), position_bias=bias
            )[0]
        )
        layers.append(lambda h, m=mlp: m.DenseReluDense(m.layer_norm(h)))
    return x, layers, encoder.final_layer_norm


def mamba_parts(model, inputs):
    """One layer in each block."""
    base = model.backbone
    layers = [lambda h, b=block: b.mixer(b.norm(h)) for block in base.layers]
    return base.embeddings(inputs["input_ids"]), layers, lambda h: model.lm_head(base.norm_f(h)).float()


def whisper_parts(decoder, inputs):
    """Three layers in each block."""
    ids, states, layers = inputs["input_ids"], inputs["encoder_hidden_states"], []
    x = decoder.embed_tokens(ids) + decoder.embed_positions(ids)
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None].to(x)
    for block in decoder.layers:
        layers.append(lambda h, b=block: b.self_attn(b.self_attn_layer_norm(h), attention_mask=mask)[0])
        layers.append(
            lambda h, b=block: b.encoder_attn(b.encoder_attn_layer_norm(h), key_value_states=states)[0]
        )
        layers.append(lambda h, b=block: b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(h)))))
    return x, layers, decoder.layer_norm


gemma = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TWINS = {
    "Gemma 3": Family(
        lambda: made("Gemma3Text", "Gemma3ForCausalLM", **LANGUAGE | gemma), token_inputs, gemma_parts
    ),
    "Mixtral": Family(TAKEN["Mixtral"][0], token_inputs, llama_parts),
    "T5": Family(lambda: made("T5", "T5EncoderModel", **T5), token_inputs, t5_parts),
    "Mamba": Family(
        lambda: made("Mamba", "MambaForCausalLM", vocab_size=32, hidden_size=16, num_hidden_layers=3, state_size=4),
        token_inputs,
        mamba_parts,
    ),
    "Whisper": Family(whisper_decoder, heard, whisper_parts),
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "way"), [(1, "plain"), (2, "plain"), (3, "plain"), (3, "checkpointed"), (1, "checkpointed")]
)
@pytest.mark.parametrize("name", TWINS)
def test_with_random_queries_it_is_the_definition(name, size, way):
    family = TWINS[name]
    original = family.seeded().double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in family.inputs().items()}
    model = attnres.convert(copy.deepcopy(original), "block", size, example=inputs, eps=EPS)
    model.attnres_size = size
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
    run = checkpointed(model) if way == "checkpointed" else model
    loss = states_of(run.train()(**inputs)).square().mean()
    assert_same_gradients(family, original, model, inputs, loss)


def bloom():
    return made("Bloom", "BloomForCausalLM", vocab_size=32, hidden_size=16, n_layer=3, n_head=2)


def xglm(**more):
    sizes = {
        "vocab_size": 32,
        "d_model": 16,
        "num_layers": 3,
        "attention_heads": 2,
        "ffn_dim": 32,
        "layerdrop": 0.0,
    }
    return made("XGLM", "XGLMForCausalLM", **sizes | more)


INSIDE = (
    r".* ends inside a transformer block, .* a layers_per_block that is a multiple of 2, .* dropout to 0\.$"
)
REFUSED = {
    "OLMo 2": (lambda: causal("Olmo2"), r"^model\.layers\.0\.self_attn reads the state without a norm before it"),
    "MiniMax": (
        lambda: causal("MiniMax", **EXPERTS, head_dim=8),
        r"^model\.layers\.0\.input_layernorm normalises the stream itself",
    ),
    "RWKV": (
        lambda: made("Rwkv", "RwkvModel", vocab_size=32, hidden_size=16, num_hidden_layers=3),
        r"^blocks\.0\.pre_ln normalises the stream itself",
    ),
    "BLOOM": (bloom, r"^transformer\.h\.1\.self_attention does not receive the embedding plus the sum"),
    "ALBERT": (
        lambda: made("Albert", "AlbertModel", **LANGUAGE, embedding_size=8),
        r"albert_layers\.0 is called 3 times in one forward pass",
    ),
    "XGLM": (xglm, rf"^model\.layers\.1\.self_attn does not receive {INSIDE}"),
    "MPT": (
        lambda: made("Mpt", "MptForCausalLM", vocab_size=32, d_model=16, n_layers=3, n_heads=2, max_seq_len=32),
        rf"^The sources cannot be carried through transformer\.blocks\.0\.ffn{INSIDE}",
    ),
    "T5, both": (
        lambda: made("T5", "T5ForConditionalGeneration", **T5),
        r"^encoder\.block\.0\.layer is a stack of transformer blocks beside the longest one",
    ),
    "Whisper, both": (whisper, r"^decoder\.layers is a stack of transformer blocks beside the longest one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_for_its_reason(name):
    make, says = REFUSED[name]
    inputs = token_inputs()
    if name == "Whisper, both":
        inputs = {"decoder_input_ids": inputs["input_ids"], "input_features": torch.randn(2, 8, 40)}
    if name == "T5, both":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with pytest.raises(attnres.ConversionError, match=says) as caught:
        attnres.convert(make(), "full", example=inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [xglm, REFUSED["MPT"][0]])
def test_where_depth_blocks_may_not_end_inside_the_advice_is_right(make):
    model, inputs = make(), token_inputs()
    before = logits_of(model(**inputs))
    attnres.convert(model, "block", 4, example=inputs, eps=NEGLIGIBLE_EPS)
    assert ((logits_of(model(**inputs)) - before).norm() / before.norm()).item() < 1e-6
    if make is xglm:
        attnres.convert(xglm(dropout=0.0, activation_dropout=0.0), "full", example=inputs)
