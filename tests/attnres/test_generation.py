"""Generation with a cache against the whole sequence at once; and how much of the depth a pass keeps."""

import math
import weakref

import pytest
import torch

from attnres import generate
from attnres.cache import Cache
from attnres.depth_attention import DepthAttention
from attnres.generation import choose
from tests.attnres.models import RESIDUALS, lively_decoder, seeded_decoder, tokens


@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_cache_changes_nothing(kind):
    """A prompt, one token, two tokens: the logits of all of them at once."""
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    cache = Cache(model.config, len(inputs), inputs.shape[1], model.embedding.weight)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in inputs.split([5, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(inputs), rtol=1e-9, atol=1e-12)


def greedy_by_hand(model, inputs, new_tokens):
    with torch.no_grad():
        for _ in range(new_tokens):
            inputs = torch.cat((inputs, model(inputs)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return inputs


@pytest.mark.parametrize("kind", RESIDUALS)
def test_greedy_generation_takes_the_likeliest_token_each_time(kind):
    model, prompt = lively_decoder(context=16, **RESIDUALS[kind]), tokens(length=3)
    assert torch.equal(generate(model, prompt, 13), greedy_by_hand(model, prompt, 13))


@pytest.mark.parametrize("kind", ["full", "block of 2"])
def test_queries_are_worked_out_once_for_each_text(kind, monkeypatch):
    """Not for each token, and not once for all: the next text is of the parameters as they are then."""
    model, prompt = lively_decoder(context=16, **RESIDUALS[kind]), tokens(length=3)
    calls, work_out = [], DepthAttention.effective_query
    monkeypatch.setattr(DepthAttention, "effective_query", lambda read: calls.append(read) or work_out(read))
    generate(model, prompt, 13)
    assert len(calls) == len(model.residual.reads)
    with torch.no_grad():
        for read in model.residual.reads:
            read.query.add_(torch.randn_like(read.query))
    assert torch.equal(generate(model, prompt, 13), greedy_by_hand(model, prompt, 13))


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    for temperature in (1.0, 0.5):
        drawn = choose(logits, temperature, generator=torch.Generator().manual_seed(0))
        expected = (logits[0] / temperature).softmax(-1)
        assert drawn.shape == (20_000, 1)
        torch.testing.assert_close(
            drawn.flatten().bincount(minlength=3) / 20_000, expected, rtol=0, atol=4 / math.sqrt(20_000)
        )


def test_top_k_leaves_the_others_out_and_one_of_one_is_greedy():
    logits = torch.randn(500, 17, generator=torch.Generator().manual_seed(0))
    drawn = choose(logits, 1.0, top_k=3)
    assert (logits.topk(3).indices == drawn).any(-1).all()
    assert torch.equal(choose(logits, 1.0, top_k=1), logits.argmax(-1, keepdim=True))
    assert choose(logits, 1.0, top_k=99).shape == (500, 1)


def test_one_seed_draws_one_text():
    model, prompt = seeded_decoder(residual="full", context=32), tokens(length=3)
    texts = [
        generate(model, prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert all(torch.equal(text[:, :3], prompt) for text in texts)


def test_the_mode_is_as_before():
    model = seeded_decoder().train()
    generate(model, tokens(length=3), 2)
    assert model.training


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_the_step_compiles_once_for_all_positions(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = lively_decoder(context=16, **RESIDUALS[kind])
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda token, cache: model(token, cache)[:, -1], backend=counter, fullgraph=True)
    cache = Cache(model.config, 2, 16, model.embedding.weight)
    whole = tokens(length=16)
    with torch.no_grad():
        steps = [step(token, cache) for token in whole.split(1, dim=1)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(whole))
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", ["prenorm", "full", "block of 4, ragged"])
def test_generation_compiled_to_machine_code(kind):
    torch._dynamo.reset()
    model, prompt = lively_decoder(context=16, **RESIDUALS[kind]), tokens(length=3)
    assert torch.equal(generate(model, prompt, 13, compiled=True), generate(model, prompt, 13))


def most_kept(model, inputs):
    """The largest number of layer outputs, sums and embeddings [B, T, D] alive before any layer of one pass."""
    kept, most = [], [0]

    def count(module, args):
        most[0] = max(most[0], len({id(source()) for source in kept if source() is not None}))

    for block in model.blocks:
        for norm, layer in ((block.attention_norm, block.attention), (block.mlp_norm, block.mlp)):
            norm.register_forward_pre_hook(count)
            layer.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    model.final_norm.register_forward_pre_hook(count)
    for read in model.residual.reads:
        read.register_forward_hook(lambda module, args, out: kept.extend(weakref.ref(x) for x in args[0]))
    with torch.no_grad():
        model(inputs)
    return most[0]


def test_block_keeps_its_depth_blocks_and_full_every_layer():
    """Twelve transformer blocks, so 24 layers, in 4 depth blocks of 6."""
    full = seeded_decoder(blocks=12, residual="full")
    block = seeded_decoder(blocks=12, residual="block", layers_per_block=6)
    assert most_kept(full, tokens(length=1)) == 1 + 24
    # And the one output that has just been added to a partial sum.
    assert most_kept(block, tokens(length=1)) <= 1 + 4 + 1
