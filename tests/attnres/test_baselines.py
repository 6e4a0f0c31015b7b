"""PostNorm, DeepNorm and the rescaled residual: what makes each of them itself."""

import pytest
import torch

from attnres import Decoder
from attnres.baselines import DeepNorm
from attnres.decoder import parameter_groups
from attnres.definition import rescaled
from tests.attnres.models import (
    RESIDUALS,
    defined_pass,
    lively_decoder,
    loss_of,
    seeded_decoder,
    small_config,
    tokens,
)


def test_a_postnorm_decoder_by_hand():
    model, inputs = lively_decoder(residual="postnorm", blocks=1), tokens()
    (block,) = model.blocks
    x = block.attention_norm(model.embedding(inputs))
    x = block.mlp_norm(x + block.attention(x))
    x = model.final_norm(x + block.mlp(x))
    torch.testing.assert_close(model(inputs), model.head(x))


def test_deepnorm_scales_what_a_layer_was_given():
    """Three transformer blocks: (2·3)^¼ on the way, (8·3)^-¼ in the weights (DeepNet, decoder only)."""
    residual = seeded_decoder(residual="deepnorm").residual
    assert residual.scale == pytest.approx(6**0.25)
    assert residual.gain == pytest.approx(24**-0.25)
    stream = residual.open(torch.zeros(1, 1, 2))
    stream.write(torch.full((1, 1, 2), 5.0), given=torch.ones(1, 1, 2))
    torch.testing.assert_close(stream.read(), torch.full((1, 1, 2), 5.0 + 6**0.25))


def test_deepnorm_starts_from_xavier_weights_shrunk_by_its_gain():
    torch.manual_seed(0)
    model = Decoder(small_config(width=256, residual="deepnorm"))
    gain = DeepNorm(model.config.blocks).gain
    for block in model.blocks:
        shrunk = (
            block.attention.value,
            block.attention.output,
            block.mlp.gate,
            block.mlp.up,
            block.mlp.output,
        )
        for linear in (block.attention.query, block.attention.key, *shrunk):
            xavier = (2 / sum(linear.weight.shape)) ** 0.5
            expected = xavier * gain if linear in shrunk else xavier
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_deepnorm_shares_embedding_and_head_with_the_others_and_has_its_own_layers():
    plain, deep = seeded_decoder(), seeded_decoder(residual="deepnorm")
    assert torch.equal(plain.embedding.weight, deep.embedding.weight)
    assert torch.equal(plain.head.weight, deep.head.weight)
    assert not torch.equal(plain.blocks[0].mlp.up.weight, deep.blocks[0].mlp.up.weight)


def test_a_rescaled_state_is_the_mean_of_its_sources():
    model, inputs = lively_decoder(residual="rescaled"), tokens()
    twin = defined_pass(model, model.embedding(inputs))
    sources = torch.stack([model.embedding(inputs), *twin.outputs])
    torch.testing.assert_close(twin.final_state, sources.mean(0))
    torch.testing.assert_close(twin.states[2], sources[:3].mean(0))
    for count, weight in enumerate(twin.weights, 1):
        assert weight.shape == (count, *inputs.shape)
        torch.testing.assert_close(weight.sum(0), torch.ones_like(weight[0]))


def test_the_rescaled_residual_is_full_attnres_that_never_learned_to_choose():
    full, plain = seeded_decoder(residual="full").double(), seeded_decoder(residual="rescaled").double()
    inputs = tokens()
    torch.testing.assert_close(plain(inputs), full(inputs), rtol=1e-12, atol=1e-12)


def test_the_first_layer_of_the_rescaled_residual_halves_the_sum():
    one, two = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 5.0)
    twin = rescaled(one, [lambda h: two])
    assert torch.equal(twin.final_state, torch.full((1, 1, 1), 4.0))


@pytest.mark.parametrize("kind", ["postnorm", "deepnorm", "rescaled"])
def test_a_baseline_learns(kind):
    model, inputs = seeded_decoder(**RESIDUALS[kind]), tokens()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model(inputs), inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
