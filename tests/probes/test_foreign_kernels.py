"""Depth weights of kernels that show no operation, in plain torch and numpy in the place of Triton."""

import numpy as np
import pytest
import torch

import probes
from tests.probes.foreign import Foreign
from tests.probes.test_foreign import assert_own, own_weights, recorded, tokens


def mixed(query, gain, after, values, normaliser="softmax"):
    """A read in plain torch: the mix, normalised where `after` is given, and the weights."""
    keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
    weight = torch.sigmoid(keys @ query) if normaliser == "sigmoid" else (keys @ query).softmax(0)
    mix = (weight.unsqueeze(-1) * values).sum(0)
    if after is not None:
        mix = mix * torch.rsqrt(mix.pow(2).mean(-1, keepdim=True) + 1e-6) * after
    return mix, weight


def hidden(query, gain, after, values, normaliser):
    """The same, without an operation that torch would see."""
    given = (None if each is None else each.detach().numpy() for each in (query, gain, after, values))
    query, gain, after, v = given
    logits = (v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-6) * gain) @ query
    weight = np.exp(logits - logits.max(0))
    weight = 1 / (1 + np.exp(-logits)) if normaliser == "sigmoid" else weight / weight.sum(0)
    mix = (weight[..., None] * v).sum(0)
    return mix if after is None else mix / np.sqrt((mix * mix).mean(-1, keepdims=True) + 1e-6) * after


def gradients_of(given, normaliser, gradient):
    given = [None if each is None else each.detach().requires_grad_() for each in given]
    with torch.enable_grad():
        mix = mixed(*given, normaliser)[0]
        found = iter(torch.autograd.grad(mix, [each for each in given if each is not None], gradient))
    return [None if each is None else next(found) for each in given]


class Kernel(torch.autograd.Function):
    """A fused read as a Triton kernel is one: it fills an empty tensor, and torch sees no operation."""

    @staticmethod
    def forward(ctx, query, gain, after, values, normaliser):
        ctx.given, ctx.normaliser = (query, gain, after, values), normaliser
        mix = torch.empty_like(values[0]).view(-1, values.shape[-1])
        mix.numpy()[...] = hidden(query, gain, after, values, normaliser).reshape(mix.shape)
        return mix.view(values.shape[1:])

    @staticmethod
    def backward(ctx, gradient):
        return *gradients_of(ctx.given, ctx.normaliser, gradient), None


@torch.library.custom_op("tests::fused_read", mutates_args=())
def registered(
    query: torch.Tensor, gain: torch.Tensor, after: torch.Tensor | None, values: torch.Tensor, normaliser: str
) -> torch.Tensor:
    """The same as an operator that is registered with torch."""
    return torch.from_numpy(hidden(query, gain, after, values, normaliser))


def keep(ctx, inputs, output):
    ctx.given, ctx.normaliser = inputs[:4], inputs[4]


registered.register_autograd(
    lambda ctx, gradient: (*gradients_of(ctx.given, ctx.normaliser, gradient), None), setup_context=keep
)


KERNELS = {"function": Kernel.apply, "operator": registered}


class Fused(Foreign):
    def __init__(self, kernel, normaliser="softmax", normed=False, **sizes):
        super().__init__(**sizes)
        self.kernel, self.kind = kernel, normaliser
        for read in self.reads:
            read.after = torch.nn.Parameter(torch.rand(read.width) + 0.5) if normed else None

    def read(self, number, done, partial):
        read, values = self.reads[number], torch.stack([*done, *([] if partial is None else [partial])])
        given = read.query, read.gain, read.after, values, self.kind
        if read.asked:
            read.kept(mixed(*given)[1])
        return KERNELS[self.kernel](*given)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_shows_nothing_is_tried(kernel, normed, tmp_path):
    model, batch = Fused(kernel, normed=normed, size=2, width=8), tokens(3, 8)  # too narrow for least squares
    with torch.no_grad():
        model.reads[1].query.zero_()  # as most begin with: it is tried with other values
    own = own_weights(model, batch)
    norms = [(read.query * read.gain).norm().item() for read in model.reads]
    run = recorded(model, tmp_path / "run", batch)
    assert_own(run, own)
    np.testing.assert_allclose(run["query_norm"][0], norms, rtol=1e-5)
    assert "follows the definition" in str(probes.describe(model))
    assert ("the states are those behind it" in str(probes.describe(model))) == normed


def test_another_kernel_that_shows_nothing_is_solved_for(tmp_path):
    model, batch = Fused("function", "sigmoid", size=2, width=32), tokens(3, 8)
    own = own_weights(model, batch)
    run = recorded(model, tmp_path / "run", batch)
    assert_own(run, own[-len(run.reads) :])
    assert "least squares" in str(probes.describe(model))
