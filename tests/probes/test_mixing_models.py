"""Recovered mixing of models: ours, those of transformers, static weights, padded tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import probes
from tests.attnres.families import FAMILIES, logits_of
from tests.probes.models import batches, decoder, loss_of, sgd
from tests.probes.recovering import WORDS, assert_recovers, recorded


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
