"""Recovered mixing of hyper-connections, against their own coefficients."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probes
from tests.probes.hyper import Adding, Branching, ByFunction, Connection, Hyper, HyperBlock, Opened
from tests.probes.models import batches, loss_of, sgd, train
from tests.probes.recovering import WORDS, assert_recovers
from tests.probes.test_made import rms_norm


def coefficients(connections: list[tuple[Tensor, Tensor, Tensor]]) -> np.ndarray:
    """The weight of each source in each state [L+1, L+1], mean over tokens, from pre, post and comb of each layer and of
    the final read."""
    connections = [[each.detach() for each in one] for one in connections]
    streams = torch.ones(*connections[0][0].shape, 1, dtype=torch.float64)  # [B, T, n, sources]
    rows = []
    for pre, post, comb in connections:
        rows.append((pre.double().unsqueeze(-1) * streams).sum(2).mean((0, 1)))
        streams = comb.double().transpose(-1, -2) @ streams
        streams = torch.cat([streams, post.double().unsqueeze(-1)], -1)
    return np.stack([np.pad(row.numpy(), (0, len(rows) - len(row))) for row in rows])


BY_NAME = {
    "layers": ["blocks.*.attn", "blocks.*.mlp"],
    "norms": ["blocks.*.attn_norm", "blocks.*.mlp_norm", "last"],
}


@pytest.mark.parametrize(
    "block, options, compiled",
    [
        (HyperBlock, {}, False),
        pytest.param(HyperBlock, {}, True, marks=pytest.mark.long),
        (HyperBlock, BY_NAME, False),
        (Branching, BY_NAME, False),
        (Adding, {}, False),
        (ByFunction, {}, False),
    ],
)
def test_hyper_connections_against_their_own_coefficients(block, options, compiled, tmp_path, caplog):
    torch.manual_seed(0)
    model = Hyper(block, blocks=1 if compiled else 2)
    (tokens,) = batches(0, [(2, 8)])
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append(out))
        for module in model.modules()
        if isinstance(module, Connection)
    ]
    embedding = model.words(tokens)
    embedding.retain_grad()
    model.words.forward = lambda _: embedding
    loss_of(model(tokens), tokens).backward()
    del model.words.forward
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    optimizer = sgd(model)
    torch._dynamo.reset()
    trained = torch.compile(model, backend="aot_eager") if compiled else model
    with probes.record(model, tmp_path / "run", optimizer=optimizer, **options):
        train(trained, optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    if block is Adding:
        seen = [(pre, post, torch.eye(model.streams).expand_as(comb)) for pre, post, comb in seen]
    assert_recovers(run, coefficients(seen))
    # Source 0 is the embedding, not the first state; its gradient is that of all streams.
    np.testing.assert_allclose(run["output_rms"][0, 0], embedding.square().mean().sqrt().item(), rtol=1e-5)
    np.testing.assert_allclose(
        run["output_grad_rms"][0, 0], embedding.grad.square().mean().sqrt().item(), rtol=1e-4
    )
    assert options or not [record for record in caplog.records if record.name == "depthscope"]


class Static(nn.Module):
    """Coefficients are parameters, norms functions: no module is given a state or the streams."""

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.attn, self.mlp = (nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))
        self.pre, self.post = (nn.Parameter(torch.rand(2, streams)) for _ in range(2))
        self.comb = nn.Parameter(torch.rand(2, streams, streams))

    def forward(self, x):
        for row, layer in enumerate((self.attn, self.mlp)):
            output = layer(rms_norm((self.pre[row][:, None] * x).sum(2)))
            mixed = torch.einsum("ij,btid->btjd", self.comb[row], x)
            x = mixed + self.post[row][:, None] * output.unsqueeze(2)
        return x

    def connections(self, tokens):
        shape = *tokens.shape, *self.pre.shape[1:]
        for pre, post, comb in zip(self.pre, self.post, self.comb, strict=True):
            yield tuple(
                each.detach().clone()
                for each in (pre.expand(shape), post.expand(shape), comb.expand(*shape, len(pre)))
            )


def test_static_coefficients_and_norms_that_are_functions(tmp_path, caplog):
    torch.manual_seed(0)
    model = Hyper(Static)
    (tokens,) = batches(0, [(2, 8)])
    last = []
    hook = model.last_hc.register_forward_hook(lambda m, args, out: last.append(out))
    model(tokens)
    hook.remove()
    truth = [each for block in model.blocks for each in block.connections(tokens)] + last
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, strict=True):
        loss_of(model(tokens), tokens).backward()
        optimizer.step()
    assert_recovers(probes.open_run(tmp_path / "run"), coefficients(truth))
    assert not [record for record in caplog.records if record.name == "depthscope"]


def test_what_a_layer_makes_is_not_taken_for_a_part_of_it():
    with pytest.raises(probes.RunError, match="No transformer layers"):
        probes.describe(Hyper(Opened))


@torch.no_grad()
def pre(module, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """What DeepSeek-V4 reads its streams with, which it does not return."""
    n = x.shape[2]
    mixed = module.input_norm(x.flatten(2)) @ weight[:n].T
    return torch.sigmoid(mixed * scale + bias[:n]) + getattr(module, "hc_eps", 1e-6)


def test_deepseek_v4_against_its_own_coefficients(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV4Config(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=16,
        o_lora_rank=16, o_groups=1, index_n_heads=2, index_head_dim=16, index_topk=4, sliding_window=8,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).train()
    with torch.no_grad():  # so that tokens differ
        for name, parameter in model.named_parameters():
            if "hc" in name:
                parameter.add_(torch.randn_like(parameter))
    seen, streams = [], []
    inner = model.model
    connections = [hc for layer in inner.layers for hc in (layer.attn_hc, layer.ffn_hc)]
    hooks = [
        hc.register_forward_hook(lambda m, args, out: seen.append((args[0], *out))) for hc in connections
    ]
    hooks.append(inner.hc_head.register_forward_hook(lambda m, args, out: streams.append(args[0])))
    (tokens,) = batches(0, [(2, 8)])
    model(tokens)
    for hook in hooks:
        hook.remove()
    parts = [
        (pre(hc, x, hc.fn, hc.base, hc.scale[0]), post, comb)
        for hc, (x, post, comb, _) in zip(connections, seen, strict=True)
    ]
    head = inner.hc_head
    parts.append((pre(head, streams[0], head.hc_fn, head.hc_base, head.hc_scale), *parts[-1][1:]))
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        model(tokens).logits.square().mean().backward()
        optimizer.step()
    assert_recovers(probes.open_run(tmp_path / "run"), coefficients(parts))
    assert not [record for record in caplog.records if record.name == "depthscope"]
