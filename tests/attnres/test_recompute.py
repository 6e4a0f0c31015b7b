"""Mixes computed again in backward: the same gradients, from less memory."""

import pytest
import torch

from tests.attnres.models import ATTNRES, RESIDUALS, lively_decoder, loss_of, seeded_decoder, tokens


def gradients(model, inputs, run=None):
    return torch.autograd.grad(
        loss_of((model if run is None else run)(inputs), inputs), list(model.parameters())
    )


@pytest.mark.parametrize("kind", ATTNRES)
def test_the_gradients_are_the_same(kind):
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    kept = gradients(model, inputs)
    model.residual.recompute = True
    torch.testing.assert_close(gradients(model, inputs), kept, rtol=0, atol=0)


def saved_bytes(model, inputs):
    """What the graph keeps for backward: distinct storages."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model(inputs), inputs)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_no_mix_is_kept(kind):
    model, inputs = seeded_decoder(width=64, **RESIDUALS[kind]), tokens()
    kept = saved_bytes(model, inputs)
    model.residual.recompute = True
    one_state = 4 * inputs.numel() * 64
    # One for each layer's read and the final one; the first read's is the embedding's copy.
    assert kept - saved_bytes(model, inputs) >= (model.config.layers + 1) * one_state


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_it_compiles(kind):
    torch._dynamo.reset()
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    model.residual.recompute = True
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradients(model, inputs, compiled), gradients(model, inputs), rtol=1e-9, atol=1e-12
    )
