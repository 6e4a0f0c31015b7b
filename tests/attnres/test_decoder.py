"""The decoder: its configuration, its layers, its initial weights, its parameter groups."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

import attnres
from attnres import Decoder, DecoderConfig
from attnres.decoder import initialise, parameter_groups
from attnres.layers import Attention, Rotary
from tests.attnres.models import RESIDUALS, lively_decoder, loss_of, seeded_decoder, small_config, tokens

KINDS = ["prenorm", "full", "block of 2"]


def test_defaults_are_worked_out():
    config = DecoderConfig()
    assert (config.layers, config.head_width, config.hidden_width) == (24, 32, 352)
    assert dataclasses.replace(config, mlp_width=100).hidden_width == 100


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_inputs_give_the_same_logits_where_they_overlap(kind):
    """Causal, and independent of the length: no token sees a later one."""
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    torch.testing.assert_close(model(inputs[:, :5]), model(inputs)[:, :5])


def test_children_of_a_transformer_block_come_in_the_order_of_the_pass():
    block = seeded_decoder().blocks[0]
    assert [name for name, _ in block.named_children()] == ["attention_norm", "attention", "mlp_norm", "mlp"]


def test_grouped_attention_is_plain_attention_with_repeated_heads():
    config = small_config(heads=4, kv_heads=2)
    torch.manual_seed(0)
    attention = Attention(config, Rotary(config.head_width, config.context, config.rope_base)).double()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    heads = [layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (attention.query, attention.key)]
    query, key = (attention.rotary(h) for h in heads)
    value = attention.value(x).unflatten(-1, (-1, 4)).transpose(1, 2).repeat_interleave(2, dim=1)
    scores = query @ key.repeat_interleave(2, dim=1).mT / 2
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    plain = attention.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), plain)


def test_rotary_products_depend_on_the_distance_only():
    rotary = Rotary(head_width=8, context=16, base=100.0)
    query, key = (rotary(torch.randn(8).expand(1, 1, 16, 8)) for _ in range(2))
    products = (query @ key.mT)[0, 0]
    for distance in (-3, 0, 5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products[0, 0], products[0, 5])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_seed_gives_the_same_shared_weights_whatever_the_residual(kind):
    shared = seeded_decoder(seed=3).state_dict()
    weights = seeded_decoder(seed=3, **RESIDUALS[kind]).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in shared.items())
    assert all(name.startswith("residual.reads.") for name in weights.keys() - shared.keys())


def test_weights_start_at_their_spread():
    model = Decoder(DecoderConfig(blocks=2))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_queries_survive_a_generic_init(kind):
    model = seeded_decoder(**RESIDUALS[kind])
    before = model.head.weight.clone()
    model.apply(initialise)
    assert not torch.equal(model.head.weight, before)
    for read in model.residual.reads:
        assert torch.equal(read.query, torch.zeros(16))
        assert torch.equal(read.gain, torch.ones(16))


def test_parameter_groups_hold_every_parameter_once_and_decay_matrices_only():
    model = seeded_decoder(residual="full")
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, spared_names = ([names.pop(id(p)) for p in group["params"]] for group in (decayed, spared))
    assert not names
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(decayed_names) == linear
    assert {"embedding.weight", "residual.reads.0.query", "residual.reads.6.gain"} <= set(spared_names)


def test_weight_decay_leaves_queries_alone():
    model, inputs = lively_decoder(residual="full"), tokens()
    before = [read.query.clone() for read in model.residual.reads]
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    (0 * loss_of(model(inputs), inputs)).backward()
    optimizer.step()
    assert all(torch.equal(read.query, old) for read, old in zip(model.residual.reads, before, strict=True))


def test_without_torch_the_import_says_what_to_install():
    program = (
        "import sys; sys.modules['torch'] = None\ntry: import attnres\nexcept ImportError as e: print(e)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == 'attnres needs torch: pip install "depthscope[probes]"\n'


def test_ours_can_be_told_from_another_package_of_the_name():
    assert attnres.__depthscope__ is True
