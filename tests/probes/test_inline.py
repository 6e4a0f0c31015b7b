"""Plain residuals that are written in the model's own forward, of layers that nobody holds together."""

import numpy as np
import pytest
import torch
from torch import nn

import probes
from tests.probes.models import batches, sgd
from tests.probes.recovering import WORDS
from tests.probes.test_made import WIDTH, Mixer, rms_norm
from tests.probes.test_sublayers import mlp


class Attributes(nn.Module):
    """Each layer is an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (nn.LayerNorm(WIDTH) for _ in range(4))
        self.attn_1, self.mlp_1, self.attn_2, self.mlp_2 = Mixer(), mlp(), Mixer(), mlp()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def stream(self, x):
        x = x + self.attn_1(self.norm_1(x))
        x = x + self.mlp_1(self.norm_2(x))
        x = x + self.attn_2(self.norm_3(x))
        return x + self.mlp_2(self.norm_4(x))

    def forward(self, tokens, targets=None):
        _, count = tokens.shape
        x = self.words(tokens) + self.places(torch.arange(count, device=tokens.device))
        self.first = x
        logits = self.head(self.norm(self.stream(x)))
        return (
            logits
            if targets is None
            else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )


class Lists(Attributes):
    """A list for each kind."""

    def __init__(self):
        super().__init__()
        for name in ("norm_1", "norm_2", "norm_3", "norm_4", "attn_1", "attn_2", "mlp_1", "mlp_2"):
            delattr(self, name)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.attns, self.mlps = (nn.ModuleList(kind() for _ in range(2)) for kind in (Mixer, mlp))

    def stream(self, x):
        for attn, dense, one, two in zip(
            self.attns, self.mlps, self.norms[::2], self.norms[1::2], strict=True
        ):
            x = x + attn(one(x))
            x = x + dense(two(x))
        return x


class Functional(Lists):
    """No module is given a state but the last."""

    def stream(self, x):
        for attn, dense in zip(self.attns, self.mlps, strict=True):
            x = x + attn(rms_norm(x))
            x = x + 0.5 * dense(rms_norm(x))
        return x


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Attributes()

    def forward(self, tokens):
        return self.model(tokens)

    @property
    def first(self):
        return self.model.first


@pytest.mark.parametrize("kind", [Attributes, Lists, Functional, Inside])
def test_its_layers_are_found(kind, tmp_path):
    torch.manual_seed(0)
    model = kind()
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 7)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, strict=True):
        model(tokens).square().mean().backward()
        embedding = float(model.first.detach().square().mean().sqrt())
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert [(layer.kind, layer.block) for layer in run.layers] == [
        ("attention", 1), ("mlp", 1), ("attention", 2), ("mlp", 2),
    ]  # fmt: skip
    np.testing.assert_allclose(run["output_rms"][0, 0], embedding, rtol=1e-5)
    np.testing.assert_allclose(run["mixing_weight"][0][np.tri(5, dtype=bool)], 1, atol=1e-4)
    assert np.isfinite(run["hidden_rms"]).all()
    assert probes.describe(kind(), tokens).holds


class Ending(Attributes):
    def forward(self, tokens):
        return self.head(rms_norm(self.stream(self.words(tokens))))


class Beside(Attributes):
    """The stream is but a small part of it."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(20)))

    def stream(self, x):
        return self.tower(super().stream(x))


@pytest.mark.parametrize(
    ("kind", "said"), [(Ending, "no module is given the final state"), (Beside, "goes past most")]
)
def test_what_is_not_found_is_said(kind, said):
    with pytest.raises(probes.RunError, match=f"As for what it adds up itself: .*{said}"):
        probes.describe(kind())
