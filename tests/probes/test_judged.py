"""Unseen models, judged by what they say of themselves: weights, states, outputs, gradients, and training unchanged."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from tests.probes.judged import (
    JUDGED,
    WIDTH,
    WORDS,
    Attention,
    Block,
    ByKernel,
    Model,
    Read,
    output,
    state,
    told,
    weight,
)  # fmt: skip
from tests.probes.models import sgd


def tokens(length: int = 10) -> torch.Tensor:
    return torch.randint(WORDS, (3, length), generator=torch.Generator().manual_seed(3))


def trained(model, path, *batch, **options):
    """Gradients of two steps and the numbers drawn after them; recorded where a `path` is given."""
    optimizer = sgd(model)
    recorder = path and probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, **options)
    torch.manual_seed(5)
    left = []
    for _ in range(2):
        model(*batch)[1].backward()
        left += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    if recorder:
        recorder.close()
    return [*left, torch.rand(1)]


def own(model, *batch):
    told.begin()
    told.listening = True
    torch.manual_seed(5)
    try:
        loss = model(*batch)[1]
    finally:
        told.listening = False
    loss.backward()
    return told


def rms(tensors):
    return [each.detach().double().square().mean().sqrt().item() for each in tensors]


def judged(model, path, *batch, **options):
    """The run of a model, whose weights, and training without probes, are its own."""
    twin, alone = copy.deepcopy(model), copy.deepcopy(model)
    with_us, without = trained(model, path, *batch, **options), trained(alone, None, *batch)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(with_us, without, strict=True))
    run, mine = probes.open_run(path), own(twin, *batch)
    wide = [weights for weights in mine.weights if len(weights) > 1]
    rows = [
        run["depth_weight"][0, row, : read.sources] for row, read in enumerate(run.reads) if read.sources > 1
    ]
    assert len(rows) == len(wide)
    for weights in wide:
        near = [
            row for row in rows if len(row) == len(weights) and np.allclose(row, weights.mean(1), atol=1e-6)
        ]
        assert len(near) == 1, (weights.mean(1), rows)
    return run, mine


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_recorded_is_the_models_own(name, tmp_path):
    torch.manual_seed(1)
    run, mine = judged(JUDGED[name](), tmp_path / "run", tokens(), tokens())
    found = {
        "hidden_rms": rms(mine.states),
        "output_rms": rms(mine.outputs),
        "hidden_grad_rms": rms(each.grad for each in mine.states),
        "output_grad_rms": rms(each.grad for each in mine.outputs),
    }
    for metric, expected in found.items():
        np.testing.assert_allclose(run[metric][0], expected, rtol=1e-3, atol=1e-7)
    kinds = [layer.kind for layer in run.layers]
    assert kinds == ["attention", "mlp"] * (len(kinds) // 2)


def test_sources_that_hold_a_read_are_named():
    assert "sources that hold a read: 3 are" in str(probes.describe(JUDGED["plain residual inside"]()))


class InHalf(Model):
    """Within autocast the kernel is given queries and keys in bfloat16, and keeps its weights in float32."""

    def __init__(self):
        super().__init__(RoundedForKernel)

    def forward(self, idx, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(idx, targets)


class RoundedForKernel(ByKernel):
    def forward(self, sources):
        values = torch.stack(sources, 2)
        keys = self.norm(values)
        query = self.query.expand(*values.shape[:2], 1, WIDTH)
        scores = (query.bfloat16().float() * keys.bfloat16().float()).sum(-1) * WIDTH**-0.5
        weight(scores.softmax(2).movedim(2, 0))
        return F.scaled_dot_product_attention(query, keys, values).squeeze(2)


def test_weights_of_a_kernel_are_not_rounded_with_what_it_returns(tmp_path):
    torch.manual_seed(1)
    judged(InHalf(), tmp_path / "run", tokens(), tokens())


class Gumbel(Read):
    def weights(self, values):
        return F.gumbel_softmax(self.norm(values) @ self.query, dim=0)


class Noisy(Read):
    def weights(self, values):
        scores = self.norm(values) @ self.query
        return (scores + torch.empty_like(scores).exponential_()).softmax(0)


class Attend(nn.Module):
    def forward(self, query, keys, values):
        return F.scaled_dot_product_attention(query, keys, values, dropout_p=0.2)


class DroppedInKernel(ByKernel):
    def __init__(self):
        super().__init__()
        self.attend = Attend()

    def forward(self, sources):
        values = torch.stack(sources, 2)
        query = self.query.expand(*values.shape[:2], 1, WIDTH)
        return self.attend(query, self.norm(values), values).squeeze(2)


@pytest.mark.parametrize("read", [Gumbel, Noisy, DroppedInKernel])
def test_reads_that_draw_random_numbers_are_left_alone(read, tmp_path, caplog):
    torch.manual_seed(1)
    model, batch = Model(read), tokens()
    alone = copy.deepcopy(model)
    with_us, without = trained(model, tmp_path / "run", batch, batch), trained(alone, None, batch, batch)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(with_us, without, strict=True))
    run = probes.open_run(tmp_path / "run")
    assert [read for read in run.reads if read.sources > 1] == [] or "depth_weight" not in run.metrics
    assert np.isfinite(run["hidden_rms"][0]).all() and len(run.layers) == 4
    assert "random numbers are drawn on the way to the weights" in caplog.text


def test_stochastic_depth_is_told_whatever_was_dropped_first():
    for seed in range(4):  # with one of these, a layer is dropped for all of the few samples
        torch.manual_seed(seed)
        sites = probes.describe(JUDGED["stochastic depth"]()).sites
        assert [read.label for read in sites.found.rows][1:] == [
            "layer 2 (MLP)", "layer 3 (attention)", "layer 4 (MLP)", "final read",
        ]  # fmt: skip


class Crossing(Block):
    def __init__(self, read):
        super().__init__(read)
        self.read3, self.norm3 = read(), nn.LayerNorm(WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, sources, memory):
        sources = super().forward(sources)
        x = self.norm3(state(self.read3(sources)))
        return [*sources, output(self.cross(x, memory, memory)[0])]


class Translating(Model):
    """An encoder and a decoder, each with a history of its own."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleList([Crossing(Read)])
        self.decoded, self.after = Read(), nn.LayerNorm(WIDTH)

    def forward(self, idx, targets):
        sources = [output(self.embedding(idx))]
        for block in self.blocks:
            sources = block(sources)
        memory, history = self.end(sources), [output(self.embedding(targets))]
        for block in self.decoder:
            history = block(history, memory)
        logits = self.head(self.after(state(self.decoded(history))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_an_encoder_and_a_decoder_of_another_length(tmp_path):
    torch.manual_seed(1)
    run, mine = judged(Translating(), tmp_path / "run", tokens(10), tokens(6))
    assert [layer.name for layer in run.layers][4:] == ["decoder.0.attn", "decoder.0.mlp", "decoder.0.cross"]
    outputs = rms(mine.outputs)
    np.testing.assert_allclose(
        run["output_rms"][0], outputs[:5] + outputs[6:], rtol=1e-3
    )  # one embedding's row
    assert "source 2" in [source.label for source in run.sources]


class ByConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), Attention()) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Conv2d(count + 1, 1, 1, bias=False) for count in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def mix(self, read, sources):
        weight(read.weight.view(-1, 1, 1).expand(-1, *sources[0].shape[:2]))
        return read(torch.stack(sources, 1)).squeeze(1)

    def forward(self, idx, targets):
        sources = [self.embedding(idx)]
        for read, layer in zip(self.mixes, self.layers, strict=False):
            sources.append(layer(self.mix(read, sources)))
        logits = self.head(self.norm(self.mix(self.mixes[-1], sources)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_blocks_that_nobody_has_followed_are_run(tmp_path):
    """Their norms and sublayers pair up, as in a plain residual."""
    torch.manual_seed(1)
    judged(ByConvolution(), tmp_path / "run", tokens(), tokens())


class Registers(Model):
    """Two learned tokens before the others."""

    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, idx, targets):
        words = self.embedding(idx)
        sources = [output(torch.cat([self.registers.expand(len(words), -1, -1), words], 1))]
        for block in self.blocks:
            sources = block(sources)
        logits = self.head(self.end(sources)[:, 2:])
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class OfDict(Model):
    def forward(self, batch):
        return super().forward(batch["idx"], batch["targets"])


class OfPatches(Model):
    """Patches of an image and a class token, given with a time that scales what the head is given."""

    def __init__(self):
        super().__init__(ByKernel)
        self.patches, self.first = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.time = nn.Linear(1, WIDTH)

    def end(self, sources):
        return F.layer_norm(state(self.last(sources)), (WIDTH,)) * (1 + self.scale)

    def forward(self, image, time):
        self.scale = self.time(time[:, None])[:, None]
        x = self.patches(image).flatten(2).mT
        sources = [output(torch.cat([self.first.expand(len(x), -1, -1), x], 1))]
        for block in self.blocks:
            sources = block(sources)
        return None, self.head(self.end(sources)).square().mean()


@pytest.mark.parametrize("kind", [Registers, OfDict, OfPatches])
def test_streams_of_another_length_and_inputs_that_are_given(kind, tmp_path):
    torch.manual_seed(1)
    batches = {
        Registers: (tokens(), tokens()),
        OfDict: ({"idx": tokens(), "targets": tokens()},),
        OfPatches: (torch.randn(2, 3, 8, 8), torch.rand(2)),
    }
    batch = batches[kind]
    example = {} if kind is Registers else {"example": batch}
    if example:
        with pytest.raises(probes.RunError, match="give record an example= of its input"):
            probes.record(kind(), tmp_path / "none", optimizer=None)
    run, mine = judged(kind(), tmp_path / "run", *batch, **example)
    assert len(run.layers) == 4
    np.testing.assert_allclose(run["hidden_rms"][0], rms(mine.states), rtol=1e-3)
    np.testing.assert_allclose(run["output_rms"][0], rms(mine.outputs), rtol=1e-3)
