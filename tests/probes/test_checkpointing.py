"""Activation checkpointing: what is computed twice counts once, and its gradients are seen."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import probes
from probes.backwards import backward_id, in_backward
from tests.probes.models import batches, sgd

WAYS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "non-reentrant, to the end": {"use_reentrant": False, "early_stop": False},
}
SIZES = ((2, 8), (1, 5))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """A pre-norm stack whose blocks are recomputed in segments of `segment` blocks, in `rounds` rounds."""

    def __init__(self, way=None, segment=1, rounds=1, blocks=4, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(17, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.final_norm = nn.LayerNorm(width)
        self.way, self.segment, self.rounds = way, segment, rounds

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(self.rounds):
            for first in range(0, len(self.blocks), self.segment):
                run = nn.Sequential(*self.blocks[first : first + self.segment])
                x = run(x) if self.way is None else checkpoint(run, x, **self.way)
        return self.final_norm(x)


def recorded(path, model, compiled=False, steps=2, tokens_of=lambda s: batches(s, SIZES)):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True):
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        for s in range(steps):
            optimizer.zero_grad()
            for tokens in tokens_of(s):
                model(tokens).square().sin().mean().backward()
            optimizer.step()
    return probes.open_run(path)


# Clocks, and what is nothing but rounding.
UNLIKE = {"step_time", "wall_time", "probe_time", "identity_error"}


def assert_same(found, expected, tolerance=1e-6, unlike=UNLIKE):
    assert set(found.metrics) - unlike == set(expected.metrics) - unlike
    for name in set(expected.metrics) - unlike:
        # Of large parts of either sign, nearly nothing may be left.
        least = tolerance * np.nanmax(np.abs(expected[name])) if name == "depth_attribution" else 1e-9
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=least, err_msg=name)


@pytest.mark.parametrize("segment", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_that_of_the_model_without_it(way, segment, tmp_path):
    found = recorded(tmp_path / "checkpointed", Stack(WAYS[way], segment))
    expected = recorded(tmp_path / "plain", Stack())
    assert np.isfinite(expected["hidden_grad_rms"]).all() and np.isfinite(expected["output_grad_rms"]).all()
    assert_same(found, expected)


def test_the_plain_rows_are_autograds(tmp_path):
    """The twin of the test above: its reference against gradients that autograd gives."""
    model = Stack()
    places = {}

    def keep(name):
        def hook(module, args):
            args[0].retain_grad()
            places[name] = args[0]

        return hook

    (tokens,) = batches(0, [(2, 8)])
    handles = [
        norm.register_forward_pre_hook(keep(row))
        for row, norm in enumerate(
            [norm for b in model.blocks for norm in (b.attn_norm, b.mlp_norm)] + [model.final_norm]
        )
    ]
    model(tokens).square().sin().mean().backward()
    expected = [places[row].grad.square().mean().sqrt().item() for row in range(9)]
    for handle in handles:
        handle.remove()
    run = recorded(tmp_path / "run", Stack(), steps=1, tokens_of=lambda s: [tokens])
    np.testing.assert_allclose(run["hidden_grad_rms"][0], expected, rtol=1e-5)


def test_compiled_checkpointing(tmp_path):
    torch._dynamo.reset()
    found = recorded(tmp_path / "compiled", Stack(WAYS["non-reentrant"], blocks=1), compiled=True, steps=1)
    plain = recorded(tmp_path / "plain", Stack(blocks=1), steps=1)
    assert_same(found, plain, 1e-5, UNLIKE | {"depth_attribution"})


@pytest.mark.parametrize("way", [None, "reentrant", "non-reentrant"])
def test_layers_run_several_times(way, tmp_path, caplog):
    """A row covers all runs of its layer; the embedding is what the first run received."""
    model = Stack(WAYS.get(way), rounds=3)
    inputs, outputs = [], []
    mlp = model.blocks[1].mlp
    mlp.register_forward_hook(lambda m, args, out: None if in_backward() else outputs.append(out.detach()))
    model.blocks[0].register_forward_pre_hook(
        lambda m, args: None if in_backward() else inputs.append(args[0].detach())
    )
    run = recorded(tmp_path / "run", model, steps=1, tokens_of=lambda s: batches(s, [(2, 8)]))
    assert len(inputs) == len(outputs) == 3
    rms = lambda parts: torch.cat(parts).square().mean().sqrt().item()  # noqa: E731
    np.testing.assert_allclose(run["output_rms"][0, 4], rms(outputs), rtol=1e-5)
    np.testing.assert_allclose(run["hidden_rms"][0, 0], rms(inputs), rtol=1e-5)
    np.testing.assert_allclose(run["output_rms"][0, 0], rms(inputs[:1]), rtol=1e-5)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "depthscope"]
    assert "run several times in one forward" in message and "blocks.0.attn" in message
    if way is not None:
        assert_same(
            run,
            recorded(tmp_path / "plain", Stack(rounds=3), steps=1, tokens_of=lambda s: batches(s, [(2, 8)])),
        )


@pytest.mark.long
def test_compiled_layers_run_several_times(tmp_path, caplog):
    """The embedding's row would hold what later runs received as well: it is blank, and that is said."""
    torch._dynamo.reset()
    one = lambda s: batches(s, [(2, 8)])  # noqa: E731
    found = recorded(tmp_path / "compiled", Stack(rounds=2), compiled=True, steps=1, tokens_of=one)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "depthscope"]
    assert "saw nothing of output_rms: embedding" in message
    expected = recorded(tmp_path / "plain", Stack(rounds=2), steps=1, tokens_of=one)
    assert np.isnan(found["output_rms"][0, 0]) and np.isnan(found["output_grad_rms"][0, 0])
    np.testing.assert_allclose(found["output_rms"][0, 1:], expected["output_rms"][0, 1:], rtol=1e-5)
    np.testing.assert_allclose(found["hidden_grad_rms"], expected["hidden_grad_rms"], rtol=1e-5)


def test_the_number_of_the_backward_pass():
    """`torch._C._current_graph_task_id` is private: this is what is relied on."""
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(backward_id()))
    assert backward_id() == -1 and not in_backward()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert -1 not in seen and seen[0] != seen[1] and not in_backward()
