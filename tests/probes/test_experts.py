"""The load of experts, against the indices of the models' own routers."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import probes
from probes.experts import experts_in

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "experts_implementation": "eager",
}


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def deepseek():
    config = transformers.DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def kimi():
    config = transformers.KimiLinearConfig(
        **SIZES,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_head_dim=8,
        linear_num_heads=4,
        num_local_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        pad_token_id=None,
    )
    return transformers.KimiLinearForCausalLM(config)


class Sparse(nn.Module):
    """A list of experts, each called with its own tokens."""

    def __init__(self, experts=4, dense=False, capacity=0):
        super().__init__()
        self.gate = nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(experts))
        self.dense, self.capacity, self.chosen = dense, capacity, []

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        self.chosen.append(chosen.detach().clone())
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(1, keepdim=True)
            if self.dense:
                out = out + weight * expert(flat)
            elif self.capacity:
                here = (chosen == number).any(1).nonzero().flatten()[: self.capacity]
                buffer = flat.new_zeros(self.capacity, 16).index_copy(0, torch.arange(len(here)), flat[here])
                out = out.index_add(0, here, weight[here] * expert(buffer)[: len(here)])
            else:
                here = (chosen == number).any(1)
                out[here] = out[here] + weight[here] * expert(flat[here])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, number, **options):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = Sparse(3 + number, **options)

    def forward(self, x):
        h = self.norm_1(x)
        x = x + self.attn(h, h, h)[0]
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, recomputed=False, **options):
        super().__init__()
        self.words, self.recomputed = nn.Embedding(32, 16), recomputed
        self.blocks = nn.ModuleList(Block(number, **options) for number in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.norm(x)


def load_of(chosen, count, most):
    counts = torch.cat([each.flatten() for each in chosen]).bincount(minlength=count).double()
    share = counts / counts.sum()
    balance = -(share * share.clamp_min(1e-30).log()).sum() / torch.tensor(count).log()
    return F.pad(share, (0, most - count), value=torch.nan), balance


@pytest.mark.parametrize("make", [mixtral, deepseek, kimi])
def test_the_load_is_what_the_router_chose(make, tmp_path):
    torch.manual_seed(0)
    model = make().train()
    found = {}
    for number, block in enumerate(model.model.layers):
        experts = getattr(block.mlp, "experts", None)
        if experts is not None:
            experts.register_forward_pre_hook(
                lambda module, args, number=number: found.setdefault(2 * number + 1, []).append(args[1])
            )
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        found.clear()  # a model that may have depth reads was run when it was attached
        for seed in range(2):
            tokens = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(seed))
            model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    load, balance = run["expert_load"][0], run["expert_balance"][0]
    assert len(found) >= 2 and run.layout.experts == load.shape[1]
    for row in range(6):
        if row in found:
            chosen = [each[mask.flatten() != 0] for each in found[row]]
            share, even = load_of(chosen, load.shape[1], load.shape[1])
            np.testing.assert_allclose(load[row], share, atol=1e-6)
            assert balance[row] == pytest.approx(float(even), abs=1e-6)
        else:
            assert np.isnan(load[row]).all() and np.isnan(balance[row])


@pytest.mark.parametrize(("recomputed", "capacity"), [(False, 0), (True, 0), (False, 18)])
def test_a_list_of_experts_each_called_with_its_tokens(recomputed, capacity, tmp_path):
    """Or with a buffer for as many as may be, of which its tokens fill a part."""
    torch.manual_seed(0)
    model = Model(recomputed, capacity=capacity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=2):
        for _ in range(3):
            for block in model.blocks:
                block.mlp.chosen.clear()
            model(torch.randint(32, (2, 9))).square().mean().backward()
            optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("expert_load").tolist() == [0, 2]
    for row, block in ((1, model.blocks[0]), (3, model.blocks[1])):
        share, even = load_of(block.mlp.chosen[:1], len(block.mlp.experts), 4)
        np.testing.assert_allclose(run["expert_load"][1, row], share, atol=1e-6)
        assert run["expert_balance"][1, row] == pytest.approx(float(even), abs=1e-6)


def test_experts_that_all_get_every_token_say_nothing(tmp_path):
    model = Model(dense=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        model(torch.randint(32, (2, 9))).square().mean().backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert "expert_load" not in run and "expert_balance" not in run


def test_lists_without_a_router_are_no_experts():
    heads = nn.Module()
    heads.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    assert experts_in([heads]) is None
    heads.router = nn.Linear(16, 3)
    assert experts_in([heads]).count == 3
    assert experts_in([nn.TransformerEncoderLayer(16, 2, 16)]) is None
