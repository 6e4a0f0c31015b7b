"""Small models that others wrote, each with a twin of its AttnRes form written by hand on the definition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnres import definition

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
NEGLIGIBLE_EPS = 1e-12


@dataclass(frozen=True)
class Family:
    """How to make one and an input for it, and its layers as functions."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], dict]
    parts: Callable[[nn.Module, dict], tuple[Tensor, list[definition.Layer], definition.Layer]]
    """The embedding, f_1..f_L and what follows the final state."""
    norms_in_float32: bool = True

    def seeded(self, **changes) -> nn.Module:
        torch.manual_seed(0)
        return self.make(**changes)

    def twin(
        self, model: nn.Module, inputs: dict, queries: Sequence[Tensor], size: int, eps: float
    ) -> Tensor:
        """The logits of the unconverted model with these effective queries, by the definition."""
        embedding, layers, head = self.parts(model, inputs)
        return head(definition.block(embedding, layers, queries, size, eps).final_state)


def token_inputs() -> dict:
    return {"input_ids": torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))}


def image_inputs() -> dict:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def llama(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    grouped = {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": NEGLIGIBLE_EPS}
    return LlamaForCausalLM(LlamaConfig(**SIZES | grouped | changes))


def mistral(**changes) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    grouped = {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": NEGLIGIBLE_EPS}
    return MistralForCausalLM(MistralConfig(**SIZES | grouped | changes))


def qwen(**changes) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    grouped = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": NEGLIGIBLE_EPS,
    }
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | grouped | changes))


def gpt2(**changes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "layer_norm_epsilon": NEGLIGIBLE_EPS}
    return GPT2LMHeadModel(GPT2Config(**sizes | still | changes))


MLA = {
    "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "kv_lora_rank": 8,
    "experts_implementation": "eager", "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "rms_norm_eps": NEGLIGIBLE_EPS,
}  # fmt: skip


def deepseek(**changes) -> nn.Module:
    """Multi-head latent attention and experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
    }
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES | MLA | experts | {"num_hidden_layers": 3} | changes)
    )


def kimi(**changes) -> nn.Module:
    """Delta attention but for one block of latent attention, and experts."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    kinds = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
    }
    linear = {"linear_head_dim": 8, "linear_num_heads": 2, "num_local_experts": 4}
    tokens = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return KimiLinearForCausalLM(KimiLinearConfig(**SIZES | MLA | kinds | linear | tokens | changes))


def vit(**changes) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_labels": 5, "layer_norm_eps": NEGLIGIBLE_EPS}
    return ViTForImageClassification(ViTConfig(**sizes | image | changes))


class DiTBlock(nn.Module):
    """Norms without parameters, and scale, shift and gate from a condition, as in DiT."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def first(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, *_ = self.modulation(c).unsqueeze(1).chunk(6, -1)
        normed = self.norm1(h) * (1 + scale) + shift
        return gate * self.attn(normed, normed, normed, need_weights=False)[0]

    def second(self, h: Tensor, c: Tensor) -> Tensor:
        *_, shift, scale, gate = self.modulation(c).unsqueeze(1).chunk(6, -1)
        return gate * self.mlp(self.norm2(h) * (1 + scale) + shift)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.first(x, c)
        return x + self.second(x, c)


class DiT(nn.Module):
    """A small diffusion transformer."""

    def __init__(self, width: int = 16, depth: int = 3, eps: float = NEGLIGIBLE_EPS):
        super().__init__()
        self.patches = nn.Linear(12, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.head = nn.Linear(width, 12)
        self.checkpointing: dict | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.patches(x), self.time(t)
        for block in self.blocks:
            x = block(x, c) if self.checkpointing is None else checkpoint(block, x, c, **self.checkpointing)
        return self.head(self.norm(x))


def dit_inputs() -> dict:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(2, 5, 12, generator=generator), "t": torch.rand(2, 1, generator=generator)}


def dit_parts(model, inputs):
    c = model.time(inputs["t"])
    layers = [lambda h, f=f: f(h, c) for block in model.blocks for f in (block.first, block.second)]
    return model.patches(inputs["x"]), layers, lambda h: model.head(model.norm(h))


def llama_parts(model, inputs):
    base, layers = model.model, []
    x = base.embed_tokens(inputs["input_ids"])
    options = {"attention_mask": None}
    if hasattr(base, "rotary_emb"):
        options["position_embeddings"] = base.rotary_emb(x, torch.arange(x.shape[1]).unsqueeze(0))
    for block in base.layers:
        layers.append(lambda h, b=block: _first(b.self_attn(hidden_states=b.input_layernorm(h), **options)))
        layers.append(lambda h, b=block: b.mlp(b.post_attention_layernorm(h)))
    return x, layers, lambda h: model.lm_head(base.norm(h))


def gpt2_parts(model, inputs):
    base, layers, ids = model.transformer, [], inputs["input_ids"]
    x = base.wte(ids) + base.wpe(torch.arange(ids.shape[1]))
    for block in base.h:
        layers.append(lambda h, b=block: _first(b.attn(b.ln_1(h))))
        layers.append(lambda h, b=block: b.mlp(b.ln_2(h)))
    return x, layers, lambda h: model.lm_head(base.ln_f(h))


def vit_parts(model, inputs):
    base, layers = model.vit, []
    for block in base.layers:
        layers.append(lambda h, b=block: _first(b.attention(b.layernorm_before(h), None)))
        layers.append(lambda h, b=block: b.mlp(b.layernorm_after(h)))
    return (
        base.embeddings(inputs["pixel_values"]),
        layers,
        lambda h: model.classifier(base.layernorm(h)[:, 0]),
    )


def _first(output):
    return output[0] if isinstance(output, tuple) else output


FAMILIES = {
    "Llama": Family(llama, token_inputs, llama_parts),
    "Qwen": Family(qwen, token_inputs, llama_parts),
    "Mistral": Family(mistral, token_inputs, llama_parts),
    "GPT-2": Family(gpt2, token_inputs, gpt2_parts, norms_in_float32=False),
    "DeepSeek-V3": Family(deepseek, token_inputs, llama_parts),
    "Kimi Linear": Family(kimi, token_inputs, llama_parts),
    "ViT": Family(vit, image_inputs, vit_parts, norms_in_float32=False),
    "DiT": Family(DiT, dit_inputs, dit_parts, norms_in_float32=False),
}
LANGUAGE = [name for name, family in FAMILIES.items() if family.inputs is token_inputs]


def logits_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
