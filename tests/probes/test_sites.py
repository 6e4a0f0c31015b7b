"""Where the layers are in models depthscope has never heard of, and that their numbers are autograd's."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import probes
from probes.finding import find_sites
from probes.sites import unwrap
from tests.probes.models import KINDS, batches, decoder, loss_of, sgd, train

WIDTH = 8


class Attention(nn.Module):
    """Single-head causal attention."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.dropout(self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class GPTBlock(nn.Module):
    """Children in GPT-2's order and names."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The stack one level down, position embeddings, tied head."""

    checkpointed = False

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(17, WIDTH),
                "wpe": nn.Embedding(8, WIDTH),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList(GPTBlock() for _ in range(blocks)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, 17, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens):
        parts = self.transformer
        x = parts["drop"](parts["wte"](tokens) + parts["wpe"].weight[: tokens.shape[1]])
        for block in parts["h"]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.lm_head(parts["ln_f"](x))


class OwnRMSNorm(nn.Module):
    """A norm that no library knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden_states):
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-6)


class LlamaAttention(Attention):
    """Called by keyword, returns a tuple, and holds norms of its own."""

    def __init__(self):
        super().__init__()
        self.q_norm = OwnRMSNorm()

    def forward(self, hidden_states, mask=None):
        return super().forward(self.q_norm(hidden_states)), None


class LlamaMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 16, bias=False)
        self.down_proj = nn.Linear(16, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class LlamaBlock(nn.Module):
    """Children in LLaMA's order: sublayers first, norms after."""

    def __init__(self):
        super().__init__()
        self.self_attn = LlamaAttention()
        self.mlp = LlamaMLP()
        self.input_layernorm = OwnRMSNorm()
        self.post_attention_layernorm = OwnRMSNorm()

    def forward(self, x):
        x = x + self.self_attn(hidden_states=self.input_layernorm(hidden_states=x))[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, blocks: int = 2):
        super().__init__()
        self.embed_tokens = nn.Embedding(17, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(blocks))
        self.norm = OwnRMSNorm()
        self.lm_head = nn.Linear(WIDTH, 17, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def names(model) -> list[tuple[str, str, int]]:
    return [(site.layer.name, site.layer.kind, site.layer.block) for site in find_sites(model).layers]


# Finding


@pytest.mark.parametrize("kind", KINDS)
def test_our_decoders(kind):
    model = decoder(kind)
    sites = find_sites(model)
    assert [site.state.module for site in sites.layers[:2]] == [
        model.blocks[0].attention_norm,
        model.blocks[0].mlp_norm,
    ]
    assert [site.layer.kind for site in sites.layers] == ["attention", "mlp"] * 3
    assert [site.layer.block for site in sites.layers] == [1, 1, 2, 2, 3, 3]
    assert sites.final.module is model.final_norm
    assert len(sites.reads) == (0 if kind == "prenorm" else 7)


def test_gpt_names():
    model = GPT(2)
    assert names(model) == [
        ("transformer.h.0.attn", "attention", 1),
        ("transformer.h.0.mlp", "mlp", 1),
        ("transformer.h.1.attn", "attention", 2),
        ("transformer.h.1.mlp", "mlp", 2),
    ]
    assert find_sites(model).final.module is model.transformer["h"][-1]


def test_llama_order_pairs_each_sublayer_with_its_norm():
    model = Llama(1)
    first, second = find_sites(model).layers
    block = model.layers[0]
    assert (first.state.module, first.output.module) == (block.input_layernorm, block.self_attn)
    assert (second.state.module, second.output.module) == (block.post_attention_layernorm, block.mlp)


def test_a_model_inside_a_training_wrapper():
    wrapper = nn.Module()
    wrapper.module = GPT(1)
    wrapper.temperature = nn.Parameter(torch.ones(()))
    # Not a wrapper of torch's: it may have parameters and a forward of its own.
    assert find_sites(wrapper).root is wrapper
    assert names(wrapper)[0] == ("module.transformer.h.0.attn", "attention", 1)


def test_wrappers_of_torch_are_taken_off():
    model = GPT(1)
    assert unwrap(torch.compile(model)) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(nn.DataParallel(torch.compile(model))) is model
    assert unwrap(model) is model


class DepthReadingBlock(GPTBlock):
    """Reads that live in the blocks look like norms: leaves with two vectors."""

    def __init__(self):
        super().__init__()
        self.read = OwnRMSNorm()
        self.read.depth_sources = 1


def test_depth_reads_are_not_taken_for_norms():
    model = GPT(1)
    model.transformer["h"] = nn.ModuleList([DepthReadingBlock()])
    with pytest.raises(probes.RunError, match="2 layers and 1 depth reads"):
        find_sites(model)


@pytest.mark.parametrize(
    "model, sentence",
    [
        (
            nn.Linear(2, 2),
            "No transformer layers were found in Linear: .* Pass the module that holds the blocks",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "No transformer layers were found in Sequential"),
        ({"not": "a model"}, "A dict is not a torch.nn.Module: pass the model that is trained"),
    ],
)
def test_a_model_without_layers_gets_one_sentence(model, sentence, tmp_path):
    with pytest.raises(probes.RunError, match=sentence) as caught:
        probes.record(model, tmp_path / "run")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_on_two_devices_is_refused(tmp_path):
    model = GPT(2)
    model.transformer["h"][1].to("meta")
    with pytest.raises(probes.RunError, match="spread over cpu, meta"):
        probes.record(model, tmp_path / "run")


# Recording


def twin_of(model, layers, final_norm, tokens) -> dict[str, list[float]]:
    """RMS of states and outputs and of their gradients, by hooks that keep the tensors and plain autograd."""
    states, outputs, handles = [], [], []

    def keep(x, place):
        x.retain_grad()
        place.append(x)

    for norm, sublayer in layers:
        handles.append(
            norm.register_forward_pre_hook(
                lambda m, a, k: keep((*a, *k.values())[0], states), with_kwargs=True
            )
        )
        handles.append(
            sublayer.register_forward_hook(
                lambda m, a, out: keep(out[0] if isinstance(out, tuple) else out, outputs)
            )
        )
    handles.append(final_norm.register_forward_pre_hook(lambda m, a: keep(a[0], states)))
    loss_of(model(tokens), tokens).backward()
    for handle in handles:
        handle.remove()
    outputs = [states[0], *outputs]
    values = {
        "hidden_rms": [rms(x) for x in states],
        "output_rms": [rms(x) for x in outputs],
        "hidden_grad_rms": [rms(x.grad) for x in states],
        "output_grad_rms": [rms(x.grad) for x in outputs],
        "block_rms": [rms(x) for x in states[2::2]],
        "block_grad_rms": [rms(x.grad) for x in states[2::2]],
        "grad_norm": math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())),
    }
    model.zero_grad()
    return values


def rms(x) -> float:
    return x.detach().square().mean().sqrt().item()


def gpt_layers(model):
    return [pair for b in model.transformer["h"] for pair in ((b.ln_1, b.attn), (b.ln_2, b.mlp))]


def llama_layers(model):
    return [
        pair
        for b in model.layers
        for pair in ((b.input_layernorm, b.self_attn), (b.post_attention_layernorm, b.mlp))
    ]


@pytest.mark.parametrize("wrap", [None, nn.DataParallel])
@pytest.mark.parametrize("kind", ["gpt", "checkpointed gpt", "llama"])
def test_numbers_of_foreign_models_are_autograds(kind, wrap, tmp_path):
    torch.manual_seed(0)
    model = Llama() if kind == "llama" else GPT()
    layers = llama_layers(model) if kind == "llama" else gpt_layers(model)
    final_norm = model.norm if kind == "llama" else model.transformer["ln_f"]
    (tokens,) = batches(0, [(2, 8)])
    expected = twin_of(model, layers, final_norm, tokens)
    model.checkpointed = kind.startswith("checkpointed")
    optimizer = sgd(model)
    trained = model if wrap is None else wrap(model)
    with probes.record(trained, tmp_path / "run", optimizer=optimizer):
        train(trained, optimizer, 1)
    run = probes.open_run(tmp_path / "run")
    for name, values in expected.items():
        np.testing.assert_allclose(run[name][0], values, rtol=1e-5, err_msg=name)
    squares = (run["param_grad_norm"] ** 2).sum(1) + run["other_grad_norm"] ** 2
    np.testing.assert_allclose(squares, run["grad_norm"] ** 2, rtol=1e-6)


def test_rows_that_are_never_seen_are_named_once(tmp_path, caplog):
    class Odd(GPTBlock):
        """Goes another way when it is trained than when it is looked at."""

        skips = False

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x if self.skips else x + self.mlp(self.ln_2(x))

    model = GPT(2)
    model.transformer["h"][1] = Odd()
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        model.transformer["h"][1].skips = True
        train(model, optimizer, 3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "hidden_rms: into layer 4 (MLP); output_rms: layer 4 (MLP)" in message
    run = probes.open_run(tmp_path / "run")
    assert np.isnan(run["hidden_rms"][:, 3]).all() and np.isfinite(run["hidden_rms"][:, [0, 1, 2, 4]]).all()


def test_a_foreign_configuration_is_kept_as_far_as_json_goes(tmp_path):
    class Config:
        def to_dict(self):
            return {"dtype": torch.float16, "window": math.inf, "layers": 3, ("odd", "key"): 1}

    model = GPT(1)
    model.config = Config()
    with probes.record(model, tmp_path / "run", config={"seed": 1}, tags="only one"):
        pass
    run = probes.open_run(tmp_path / "run")
    assert run.config == {"dtype": "torch.float16", "window": "Infinity", "layers": 3, "seed": 1}
    assert run.tags == ("only one",)


class Noisy(nn.Module):
    """An unnamed sublayer with dropout that writes down what it did."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        self.last = x
        return self.two(F.dropout(self.one(x).relu(), 0.5))


class Guided(Noisy):
    def forward(self, x, guide):
        return super().forward(x) * guide


class Unnamed(nn.Module):
    """Sublayers whose names say nothing, one of which needs more than the state."""

    def __init__(self):
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.a, self.b, self.c = Attention(), Noisy(), Guided()

    def forward(self, x, guide):
        x = x + self.a(self.n[0](x))
        x = x + self.b(self.n[1](x))
        return x + self.c(self.n[2](x), guide)


def test_kinds_are_tried_where_names_say_nothing():
    """Nothing a trial does is left behind, and what cannot be tried is not given a kind."""
    torch.manual_seed(3)
    model = nn.ModuleList([nn.Embedding(17, WIDTH), nn.ModuleList(Unnamed() for _ in range(2))])
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert [site.layer.kind for site in find_sites(model).layers] == ["attention", "mlp", "layer"] * 2
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(hasattr(module, "last") for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
