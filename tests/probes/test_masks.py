"""Padded tokens do not count, whatever they hold."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import probes
from probes.masks import fitting
from probes.sampled import SAMPLED_METRICS
from probes.statistics import DepthSums, Moments, add_moments, add_nonfinite, token_mean_square
from tests.probes import zoo
from tests.probes.models import batches, decoder, loss_of, sgd
from tests.probes.test_checkpointing import UNLIKE, WAYS, Stack, assert_same

CPU = torch.device("cpu")


class Masked(nn.Module):
    """A model around another whose padded tokens see rubbish and give none of the loss."""

    def __init__(self, inner, argument="attention_mask"):
        super().__init__()
        self.inner = inner
        self.argument = argument

    def forward(self, tokens, attention_mask=None, **others):
        mask = attention_mask if self.argument == "attention_mask" else others[self.argument]
        out = self.inner(tokens)
        return out if mask is None else out * mask.unsqueeze(-1)


LENGTHS = [8, 3, 5]


def batch(seed, lengths=LENGTHS):
    tokens = torch.randint(17, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens, mask


def train(path, inner, call, steps=2, **options):
    """Train on the real tokens, called in one way or another; the loss is the same."""
    model = Masked(inner)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True, **options):
        for s in range(steps):
            optimizer.zero_grad()
            for seed in (2 * s, 2 * s + 1):
                call(model, *batch(seed)).backward()
            optimizer.step()
    return probes.open_run(path)


def padded(dtype):
    return lambda model, tokens, mask: model(tokens, attention_mask=mask.to(dtype)).square().sin().sum()


def packed(model, tokens, mask):
    return model(tokens[mask][None]).square().sin().sum()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padded_is_packed(dtype, tmp_path):
    assert_same(
        train(tmp_path / "padded", Stack(), padded(dtype)), train(tmp_path / "packed", Stack(), packed), 1e-5
    )


@pytest.mark.parametrize("way", WAYS)
def test_padded_is_packed_where_it_is_recomputed(way, tmp_path):
    assert_same(
        train(tmp_path / "padded", Stack(WAYS[way]), padded(torch.int64)),
        train(tmp_path / "packed", Stack(), packed),
        1e-5,
    )


def test_a_mask_by_position_by_name_and_by_function(tmp_path):
    expected = train(tmp_path / "packed", Stack(), packed, steps=1)
    calls = {
        "position": ({}, lambda model, tokens, mask: model(tokens, mask)),
        "name": ({"mask": "tokens_that_count"}, lambda m, t, mask: m(t, mask, tokens_that_count=mask)),
        "function": (
            {"mask": lambda args, kwargs: ~kwargs["padding"]},
            lambda model, tokens, mask: model(tokens, mask, padding=~mask),
        ),
    }
    for name, (options, call) in calls.items():
        found = train(
            tmp_path / name,
            Stack(),
            lambda *given, call=call: call(*given).square().sin().sum(),
            steps=1,
            **options,
        )
        assert_same(found, expected, 1e-5)


def test_masks_that_are_not_of_tokens_are_said(tmp_path, caplog):
    model = Masked(Stack(), "ignored")
    tokens, mask = batch(0)
    with probes.record(model, tmp_path / "run", every=1) as recorder:
        model(tokens, mask[:, None, None, :], ignored=mask).sum().backward()
        recorder.step()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "depthscope"]
    assert "masks of [B, T] only" in message
    assert np.isfinite(probes.open_run(tmp_path / "run")["hidden_rms"]).all()


def test_a_mask_nobody_knows_is_refused(tmp_path):
    with pytest.raises(probes.RunError, match="no argument 'pad' for the mask: it takes tokens"):
        probes.record(Stack(), tmp_path / "run", mask="pad")
    with pytest.raises(probes.RunError, match="mask must be the name"):
        probes.record(Stack(), tmp_path / "run", mask=torch.ones(2, 3))
    assert not (tmp_path / "run").exists()


def test_rubbish_in_padded_tokens_stays_there():
    x = torch.ones(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    x[~mask] = torch.nan
    moments, wrong = Moments(1, CPU), torch.zeros(1, dtype=torch.int64)
    add_moments(x, moments.squares[0], moments.count[0], mask)
    add_nonfinite(x, wrong, 0, mask)
    assert moments.finish().tolist() == [1] and moments.count.tolist() == [12] and wrong.tolist() == [0]
    add_nonfinite(x, wrong, 0)
    assert wrong.tolist() == [12]


def test_where_a_mask_fits():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert fitting(mask, torch.ones(2, 3, 4)) is mask
    assert fitting(mask, torch.ones(2, 3, 4, 5)) is mask
    assert fitting(mask, torch.ones(6, 4)).shape == (6,)
    mask[1, 2] = False
    assert torch.equal(fitting(mask, torch.ones(3, 2, 4)), mask.T)  # tokens first
    for shape in ((2, 4, 3), (2, 3), (5, 4), (2, 4)):  # with a class token, pooled, …
        assert fitting(mask, torch.ones(shape)) is None
    assert fitting(None, torch.ones(2, 3, 4)) is None


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 2**31)
)
def test_masked_micro_batches_are_their_tokens(masks, seed):
    """Token-weighted, whatever the sizes: the same as all tokens that count in one batch."""
    generator = torch.Generator().manual_seed(seed)
    moments, depth = (Moments(1, CPU), Moments(1, CPU)), (DepthSums([3], CPU), DepthSums([3], CPU))
    kept = []
    for row in masks:
        mask = torch.tensor([row])
        x = torch.randn(1, len(row), 4, generator=generator)
        weight = torch.softmax(torch.randn(3, 1, len(row), generator=generator), 0)
        add_moments(x, moments[0].squares[0], moments[0].count[0], mask)
        depth[0].add(0, weight, [token_mean_square(x)] * 3, mask)
        kept.append((x[mask], weight[:, mask]))
    x, weight = torch.cat([x for x, _ in kept]), torch.cat([w for _, w in kept], 1)
    add_moments(x, moments[1].squares[0], moments[1].count[0])
    depth[1].add(0, weight[:, None], [token_mean_square(x)[None]] * 3)
    torch.testing.assert_close(moments[0].finish(), moments[1].finish(), rtol=1e-5, atol=0, equal_nan=True)
    for name, value in depth[1].finish().items():
        torch.testing.assert_close(depth[0].finish()[name], value, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_compiled_with_a_mask(tmp_path):
    """No graph break, no further graph, the same numbers."""
    torch._dynamo.reset()
    runs = {}
    for way in ("eager", "compiled"):
        model = Masked(Stack(blocks=2))
        optimizer = sgd(model)
        with probes.record(model, tmp_path / way, optimizer=optimizer, every=1, matrices_every=1):
            if way == "compiled":
                counter = CompileCounterWithBackend("aot_eager")
                model.compile(fullgraph=True, backend=counter)
            for s in range(3):
                optimizer.zero_grad()
                tokens, mask = batch(s)
                model(tokens, attention_mask=mask).square().sin().sum().backward()
                optimizer.step()
        runs[way] = probes.open_run(tmp_path / way)
    assert counter.frame_count == 1
    assert_same(runs["compiled"], runs["eager"], 1e-5, UNLIKE | {"depth_attribution"})


def test_depth_weights_of_padded_batches(tmp_path):
    """Of an AttnRes model that pads on the right: causal attention keeps the padding from the rest."""
    numbers = {}
    lengths = [8, 3, 5]
    tokens, mask = batch(0, lengths)
    for way in ("padded", "single"):
        inner = decoder("full", blocks=1)
        model = Masked(inner)
        with probes.record(model, tmp_path / way, every=1, matrices_every=1, strict=True) as recorder:
            if way == "padded":
                model(tokens, mask).square().sum().backward()
            else:
                for row, length in zip(tokens, lengths, strict=True):
                    model(row[None, :length]).square().sum().backward()
            recorder.step()
        numbers[way] = probes.open_run(tmp_path / way)
    # The mixing is that of a sample of the last micro-batch.
    assert_same(numbers["padded"], numbers["single"], 1e-4, UNLIKE | set(SAMPLED_METRICS))


def test_a_mask_of_other_tokens_than_the_stack_has_is_said(tmp_path, caplog):
    """A model that puts tokens of its own before those it is given."""

    class Registers(zoo.Model):
        def forward(self, tokens, attention_mask=None):
            x = torch.cat([self.words(tokens[:, :1] * 0), self.words(tokens)], 1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.last(x))[:, 1:]

    model = Registers(zoo.Bare)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        loss_of(model(tokens, torch.ones_like(tokens)), tokens).backward()
        optimizer.step()
    (message,) = [record.message for record in caplog.records if record.name == "depthscope"]
    assert "masks of [B, T] only; here every token counts" in message
