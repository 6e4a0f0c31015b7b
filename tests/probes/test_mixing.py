"""Recovered mixing: against its definition, against the models' own coefficients, blank where it cannot be known."""

import json
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probes
from probes import samples
from probes.mixing import MIXING_METRICS, definition, recover
from probes.sampled import SAMPLED_METRICS
from tests.attnres.families import FAMILIES, logits_of
from tests.probes.models import batches, decoder, loss_of, sgd, train

WORDS = 17
EPS = float(torch.finfo(torch.float32).eps)


def recorded(model, path, steps: int = 1, **options):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **options):
        train(model, optimizer, steps)
    return probes.open_run(path)


def assert_recovers(run, truth, tolerance=1e-4):
    """Every weight that exists is shown, and is the true one [L+1, L+1]."""
    exists = np.tri(len(truth), dtype=bool)
    found = run["mixing_weight"][0]
    np.testing.assert_allclose(found[exists], np.asarray(truth)[exists], atol=tolerance)
    assert np.isnan(found[~exists]).all() and np.isnan(run["mixing_share"][0][~exists]).all()
    np.testing.assert_allclose(run["mixing_r2"][0], 1, atol=tolerance)
    np.testing.assert_allclose(np.nansum(run["mixing_share"][0], 1), run["mixing_r2"][0], atol=tolerance)
    assert (run["mixing_condition"][0] >= 1 - 1e-6).all()


# Against the definition


def sources(count: int, width: int, tokens: int = 5, alike: float = 0.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(count)
    independent = torch.randn(count, tokens, width, generator=generator)
    return (independent + alike * torch.randn(1, tokens, width, generator=generator)).numpy()


def in_float32(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`given` and `eps` of a model whose states sum all sources before them."""
    return np.arange(1, count + 1), np.full(count, EPS)


@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_all_states_at_once_are_each_by_itself(alike):
    v = sources(7, 40, alike=alike)
    h = sources(8, 40)[1:]  # states that the sources do not explain
    found = recover(h, v, *in_float32(7))
    for state in range(7):
        each = [definition(h[state, token], v[: state + 1, token]) for token in range(5)]
        _, share, r2, condition = zip(*each, strict=True)
        assert np.isnan(found["mixing_weight"][state]).all()
        np.testing.assert_allclose(found["mixing_share"][state, : state + 1], np.mean(share, 0), atol=1e-6)
        assert found["mixing_r2"][state] == pytest.approx(np.mean(r2), abs=1e-6)
        assert found["mixing_condition"][state] == pytest.approx(np.median(condition), rel=1e-6)


@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_weights_by_the_token_are_their_mean(alike):
    v = sources(7, 40, alike=alike)
    a = np.tril(np.random.default_rng(0).normal(size=(5, 7, 7)))  # [token, state, source]
    h = np.einsum("tls,std->ltd", a, v)
    found = recover(h, v, *in_float32(7))["mixing_weight"]
    by_token = [
        [definition(h[state, token], v[: state + 1, token])[0] for token in range(5)] for state in range(7)
    ]
    for state, each in enumerate(by_token):
        np.testing.assert_allclose(found[state, : state + 1], np.mean(each, 0), atol=1e-6)
        np.testing.assert_allclose(found[state, : state + 1], a[:, state, : state + 1].mean(0), atol=1e-5)


def test_a_token_whose_state_is_zero_costs_nothing_else():
    """As padding has, whose embedding is zero."""
    v = sources(3, 32)
    v[:, 1] = 0
    found = recover(v.cumsum(0), v, *in_float32(3))
    assert np.isfinite(found["mixing_share"][np.tri(3, dtype=bool)]).all()
    np.testing.assert_allclose(found["mixing_weight"][np.tri(3, dtype=bool)], 1, atol=1e-6)
    np.testing.assert_allclose(found["mixing_r2"], 1, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_something_else_in_a_state_never_makes_a_weight_wrong(size, dtype, tolerance):
    """A layer that nobody named adds to the stream, alike to the others."""
    v = torch.tensor(sources(9, 128, 16, alike=1.0)).to(dtype)
    h = v.cumsum(0, dtype=torch.float32)
    h[5:] += size * (torch.tensor(sources(10, 128, 16))[-1] + v[2])
    eps = np.full(8, torch.finfo(dtype).eps)
    found = recover(h[:8].to(dtype).float().numpy(), v[:8].float().numpy(), np.arange(1, 9), eps)
    truth = np.tri(8)
    off = np.abs(found["mixing_weight"] - truth)
    assert np.isfinite(off[:5][np.tri(8, dtype=bool)[:5]]).all() and np.nanmax(off[:5]) < tolerance
    assert np.isnan(off[5:]).all() or np.nanmax(off[5:]) < tolerance


def test_layers_side_by_side_read_the_same_sources():
    v = sources(4, 32)
    h = np.stack([v[:1].sum(0), v[:1].sum(0), v[:3].sum(0), v.sum(0)])
    found = recover(h, v, np.array([1, 1, 3, 4]), np.full(4, EPS))["mixing_weight"]
    assert np.isnan(found).tolist() == [[n >= k for n in range(4)] for k in (1, 1, 3, 4)]
    np.testing.assert_allclose(found[~np.isnan(found)], 1, atol=1e-6)


def test_more_sources_than_a_quarter_of_the_width_are_blank():
    """Where r2 would be one and the weights wrong."""
    v = sources(60, 48)
    h = v.cumsum(0)
    found = recover(h, v, *in_float32(60))
    for name in MIXING_METRICS:
        assert np.isnan(found[name][12:]).all() and not np.isnan(found[name][:12]).all()
    np.testing.assert_allclose(found["mixing_weight"][:12][np.tri(12, 60, dtype=bool)], 1, atol=1e-5)


def test_what_cannot_be_told_is_blank_and_the_rest_is_right():
    v = sources(6, 64)
    v[1] = 0  # as of a layer whose last matrix is still zero
    v[3] *= 1e-6
    v[5] = v[4]
    h = v.cumsum(0)
    found = recover(h, v, *in_float32(6))
    weight, share = found["mixing_weight"], found["mixing_share"]
    assert np.isnan(weight[5]).tolist() == [False, True, False, True, True, True]
    np.testing.assert_allclose(weight[5, [0, 2]], 1, atol=1e-4)
    np.testing.assert_allclose(weight[4, [0, 2, 4]], 1, atol=1e-4)
    # A source that is next to nothing has a share next to nothing; of two alike nobody knows whose it is.
    np.testing.assert_allclose(share[5, [1, 3]], 0, atol=1e-5)
    assert np.isnan(share[5, 4:]).all() and found["mixing_condition"][5] > 1e4
    np.testing.assert_allclose(share[4].sum(where=~np.isnan(share[4])), 1, atol=1e-5)
    np.testing.assert_allclose(found["mixing_r2"], 1, atol=1e-5)


def test_a_source_that_is_zero_at_some_tokens_is_weighed_at_the_others():
    """As where a layer is dropped for some items."""
    v = sources(4, 64)
    v[2, :2] = 0
    found = recover(v.cumsum(0), v, *in_float32(4))
    np.testing.assert_allclose(found["mixing_weight"][np.tri(4, dtype=bool)], 1, atol=1e-5)
    v[2, :3] = 0
    weight = recover(v.cumsum(0), v, *in_float32(4))["mixing_weight"]
    assert np.isnan(weight[3]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("count, width", [(9, 64), (25, 512), (49, 200)])
@pytest.mark.parametrize("tokens", [2, 32])
def test_a_weight_that_is_shown_is_right_in_every_precision(dtype, tolerance, count, width, tokens):
    """Streams that grow, sources that are alike or fade away: shown or blank, never wrong."""
    eps = np.full(count, torch.finfo(dtype).eps)
    shown = 0
    for alike, fade in ((0, 0), (2, 0), (0, 4), (2, 3)):
        v = torch.tensor(sources(count, width, tokens, alike))
        v = (v * torch.logspace(0, -fade, count)[:, None, None]).to(dtype)
        states = [v[0]]
        for each in v[1:]:
            states.append(states[-1] + each)  # rounded at every sum
        found = recover(torch.stack(states).float().numpy(), v.float().numpy(), np.arange(1, count + 1), eps)
        weight = found["mixing_weight"]
        shown += np.isfinite(weight).sum()
        assert np.nanmax(np.abs(weight - 1)) < tolerance
    # Not by leaving everything blank.
    assert shown > (0.9 if dtype == torch.float32 else 0.35) * 4 * count * (count + 1) / 2


def test_values_that_are_not_finite_cost_their_token_only():
    v = sources(3, 32)
    h = v.cumsum(0)
    h[2, 1, 7], v[1, 3, 0] = np.inf, np.nan
    found = recover(h, v, *in_float32(3))
    np.testing.assert_allclose(found["mixing_weight"][np.tri(3, dtype=bool)], 1, atol=1e-6)
    v[2] = np.nan  # and a source that nobody saw its states
    found = recover(h, v, *in_float32(3))
    assert np.isnan(found["mixing_weight"][2]).all() and np.isfinite(found["mixing_r2"]).tolist() == [1, 1, 0]
    h[:] = np.inf
    assert all(np.isnan(value).all() for value in recover(h, v, *in_float32(3)).values())


# Models


@pytest.mark.parametrize("kind", ["prenorm", "full", "block of 2", "block of 4, ragged"])
def test_our_own_residuals(kind, tmp_path):
    run = recorded(decoder(kind, width=64), tmp_path / "run")
    assert_recovers(run, by_layer(run) if kind != "prenorm" else np.ones((7, 7)))


def by_layer(run) -> np.ndarray:
    """The depth weights of a run, those of a depth block for each of its layers."""
    spans = [range(source.first, source.last + 1) for source in run.sources]
    outputs = range(len(run.layers) + 1)
    column = [next(i for i, span in enumerate(spans) if output in span) for output in outputs]
    return run["depth_weight"][0][:, column]


def test_the_rescaled_residual_is_a_mean(tmp_path):
    from attnres import Decoder, DecoderConfig

    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocabulary=WORDS, width=64, heads=2, blocks=3, residual="rescaled"))
    run = recorded(model, tmp_path / "run", layers=["blocks.*.attention", "blocks.*.mlp"],
                   norms=["blocks.*.attention_norm", "blocks.*.mlp_norm", "final_norm"])  # fmt: skip
    assert_recovers(run, np.tri(7) / np.arange(1, 8)[:, None])


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen", "ViT"])
def test_models_of_transformers_show_a_row_of_ones(name, tmp_path):
    pytest.importorskip("transformers")
    family = FAMILIES[name]
    model = family.seeded(**{"n_embd" if name == "GPT-2" else "hidden_size": 64}).train()
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        logits_of(model(**family.inputs())).square().mean().backward()
        optimizer.step()
    assert_recovers(probes.open_run(tmp_path / "run"), np.ones((7, 7)))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Static(nn.Module):
    """Every layer reads a learned mix of all sources, the same for all tokens; gains are negative as well."""

    def __init__(self, layers: int = 5, width: int = 64):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.mix = nn.Parameter(torch.randn(layers + 1, layers + 1))
        self.last = nn.LayerNorm(width)
        with torch.no_grad():
            self.mix[0, 0] = 1

    def read(self, sources: list[Tensor]) -> Tensor:
        return sum(w * v for w, v in zip(self.mix[len(sources) - 1], sources, strict=False))

    def forward(self, tokens):
        sources = [self.words(tokens)]
        for layer in self.layers:
            sources.append(layer.mlp(layer.norm(self.read(sources))))
        return self.head(self.last(self.read(sources)))


BY_HAND = {"layers": "layers.*.mlp", "norms": ["layers.*.norm", "last"]}


def test_static_weights(tmp_path):
    torch.manual_seed(0)
    model = Static()
    truth = model.mix.detach().numpy().copy()
    run = recorded(model, tmp_path / "run", **BY_HAND)
    assert_recovers(run, truth)
    assert run["identity_error"][0, 1:].min() > 0.1


@pytest.mark.parametrize("kind", ["full", "block of 2"])
def test_in_bfloat16_weights_that_vary_by_token_keep_their_mean(kind, tmp_path):
    """With sources of very different size, so that some tokens can be told better than others."""
    run = recorded(decoder(kind, width=128, blocks=4).bfloat16(), tmp_path / "run")
    truth, found = by_layer(run), run["mixing_weight"][0]
    assert run["output_rms"][0].max() > 50 * run["output_rms"][0].min()
    assert run["depth_weight_std"][0, 2:, 0].min() > 0.05
    assert np.isfinite(found).sum() > 0.8 * 45
    assert np.nanmax(np.abs(found - truth)) < 2e-2


def test_static_weights_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    model = Static()
    with torch.no_grad():
        model.mix.copy_(model.mix.bfloat16())
    truth = model.mix.detach().numpy().copy()
    run = recorded(model.bfloat16(), tmp_path / "run", **BY_HAND)
    found = run["mixing_weight"][0]
    assert np.isfinite(found).sum() > 18
    assert np.nanmax(np.abs(found - np.where(np.tri(6), truth, np.nan))) < 2e-2


class Padded(Static):
    """What padded tokens read is doubled."""

    def forward(self, tokens, attention_mask):
        self.factor = (2 - attention_mask).unsqueeze(-1)
        return super().forward(tokens)

    def read(self, sources):
        return super().read(sources) * (self.factor if len(sources) > 1 else 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_padded_tokens_do_not_count(compiled, tmp_path):
    torch.manual_seed(0)
    model = Padded(layers=1)
    truth = model.mix.detach().numpy().copy()
    (tokens,) = batches(0, [(3, 8)])
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    optimizer = sgd(model)
    torch._dynamo.reset()
    trained = torch.compile(model, backend="aot_eager") if compiled else model
    with probes.record(model, tmp_path / "run", optimizer=optimizer, **BY_HAND):
        loss_of(trained(tokens, mask), tokens).backward()
        optimizer.step()
    assert_recovers(probes.open_run(tmp_path / "run"), truth)


# Hyper-connections


class Connection(nn.Module):
    """How a layer reads from n streams and writes to them, by the token: pre, post [B, T, n] and comb [B, T, n, n]."""

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.streams = streams
        self.mix = nn.Linear(streams * width, (2 + streams) * streams)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.streams
        pre, post, comb = self.mix(x.flatten(2)).split([n, n, n * n], dim=-1)
        return pre.sigmoid(), 2 * post.sigmoid(), comb.unflatten(-1, (n, n)).softmax(-1)


class HyperBlock(nn.Module):
    def __init__(self, streams: int, width: int):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn, self.mlp = nn.Linear(width, width), Layer(width).mlp
        self.attn_hc, self.mlp_hc = Connection(streams, width), Connection(streams, width)

    def forward(self, x):
        for hc, norm, layer in (
            (self.attn_hc, self.attn_norm, self.attn),
            (self.mlp_hc, self.mlp_norm, self.mlp),
        ):
            pre, post, comb = hc(x)
            output = layer(norm((pre.unsqueeze(-1) * x).sum(2)))
            x = post.unsqueeze(-1) * output.unsqueeze(2) + comb.transpose(-1, -2) @ x
        return x


class Reading(nn.Module):
    """The same, reading by itself, for streams that are added to and not mixed."""

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.inner = Connection(streams, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre, post, _ = self.inner(x)
        return post, (pre.unsqueeze(-1) * x).sum(2)


class Branching(HyperBlock):
    """Where nothing can follow it."""

    def forward(self, x):
        return super().forward(-x if float(x.detach().sum()) == 0.5 else x)


class Adding(HyperBlock):
    def __init__(self, streams: int, width: int):
        super().__init__(streams, width)
        self.attn_hc, self.mlp_hc = Reading(streams, width), Reading(streams, width)

    def forward(self, x):
        post, h = self.attn_hc(x)
        x = x + post.unsqueeze(-1) * self.attn(self.attn_norm(h)).unsqueeze(2)
        post, h = self.mlp_hc(x)
        return x + post.unsqueeze(-1) * self.mlp(self.mlp_norm(h)).unsqueeze(2)


class Hyper(nn.Module):
    """Hyper-connections in the manner of DeepSeek-V4."""

    def __init__(self, block=HyperBlock, blocks: int = 2, streams: int = 3, width: int = 64):
        super().__init__()
        self.streams = streams
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(block(streams, width) for _ in range(blocks))
        self.last_hc, self.last = Connection(streams, width), nn.RMSNorm(width)

    def forward(self, tokens):
        x = self.words(tokens).unsqueeze(2).expand(-1, -1, self.streams, -1).contiguous()
        for block in self.blocks:
            x = block(x)
        return self.head(self.last((self.last_hc(x)[0].unsqueeze(-1) * x).sum(2)))


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


# In the writer's thread


def test_a_failure_is_a_fault_like_the_others(tmp_path, monkeypatch, caplog):
    def fail(*values):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("probes.mixing._solved", fail)
    run = recorded(decoder("full", width=64, blocks=1), tmp_path / "run", steps=2, every=1, matrices_every=1)
    (message,) = [record.message for record in caplog.records if record.name == "depthscope"]
    assert f"could not record {', '.join(SAMPLED_METRICS)} at step" in message
    assert "LinAlgError: did not converge. Training goes on" in message
    assert not set(SAMPLED_METRICS) & set(run.metrics)
    assert run.steps("depth_weight").tolist() == run.steps("grad_norm").tolist() == [0, 1]


def test_training_never_waits_for_it(tmp_path, monkeypatch):
    """Samples that the thread has not come to are few; later ones are left out, and the run says so."""
    monkeypatch.setattr(samples, "_WAITING", 0)
    go = threading.Event()
    solve = samples.of_sample

    def late(*values):
        assert go.wait(20)
        return solve(*values)

    monkeypatch.setattr(samples, "of_sample", late)
    model = decoder("full", width=64, blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        train(model, optimizer, 6)
        go.set()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("depth_weight").tolist() == list(range(6))
    assert 1 <= len(run.steps("mixing_weight")) <= 2
    end = json.loads((tmp_path / "run" / "end.json").read_text())
    assert end["missing"]["mixing_weight"]["cause"] == "samples before were not solved yet"
