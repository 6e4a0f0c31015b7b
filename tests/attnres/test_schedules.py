"""All schedules compute the same: states, weights, logits and every gradient."""

import pytest
import torch

from attnres.schedules import SCHEDULES
from tests.attnres.models import (
    ATTNRES,
    RESIDUALS,
    defined_pass,
    lively_decoder,
    loss_of,
    seeded_decoder,
    tokens,
)


def observed(model, inputs):
    """Logits, every gradient, and the weights of all reads."""
    weights = []
    handles = [
        read.register_forward_hook(lambda m, args, out: weights.append(out[1].detach()))
        for read in model.residual.reads
    ]
    logits = model(inputs)
    for handle in handles:
        handle.remove()
    return logits, torch.autograd.grad(loss_of(logits, inputs), list(model.parameters())), weights


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ATTNRES)
def test_every_schedule_is_the_definition(kind, schedule):
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    twin = defined_pass(model, model.embedding(inputs))
    defined = model.head(model.final_norm(twin.final_state))
    theirs = torch.autograd.grad(loss_of(defined, inputs), list(model.parameters()))
    model.residual.schedule = schedule
    logits, ours, weights = observed(model, inputs)
    torch.testing.assert_close(logits, defined, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights, twin.weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_too_large_for_an_exponential(schedule):
    """Queries of a thousand: only differences of logits may be exponentiated."""
    model, inputs = lively_decoder(residual="block", layers_per_block=2), tokens()
    with torch.no_grad():
        for read in model.residual.reads:
            read.query.mul_(1e3)
    expected = observed(model, inputs)
    model.residual.schedule = schedule
    torch.testing.assert_close(observed(model, inputs), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bfloat16_stays_near_float32_in_every_schedule(schedule):
    model, inputs = lively_decoder(residual="block", layers_per_block=4).float(), tokens()
    model.residual.schedule = schedule
    exact = model(inputs)
    rounded = model.bfloat16()(inputs).float()
    assert 0 < ((rounded - exact).norm() / exact.norm()).item() < 16 * 2**-8


def test_an_unknown_schedule_is_named():
    model = seeded_decoder(residual="full")
    model.residual.schedule = "fast"
    with pytest.raises(
        ValueError, match="schedule must be one of auto, no_stack, stack, two_phase, fused, not 'fast'"
    ):
        model(tokens())
