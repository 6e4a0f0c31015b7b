"""What holds for every AttnRes, whatever its weights: invariants of the equations."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres.depth_attention import DepthAttention
from attnres.residual import Block, Full, FullStream
from tests.attnres.models import ATTNRES, RESIDUALS, lively_decoder, loss_of, seeded_decoder, tokens

NEGLIGIBLE_EPS = 1e-12


def run_stream(residual, sources):
    """The states that a stream of given sources yields, and the weights of its reads."""
    weights = []
    handles = [
        read.register_forward_hook(lambda m, a, out: weights.append(out[1])) for read in residual.reads
    ]
    stream = residual.open(sources[0])
    states = [stream.read()]
    for source in sources[1:]:
        stream.write(source)
        states.append(stream.read())
    for handle in handles:
        handle.remove()
    return states, weights


@st.composite
def streams(draw):
    """A residual of up to eight layers with random queries, and sources of very different sizes."""
    layers, width = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    size = draw(st.sampled_from([None, 1, 2, 3, 5, 8]))
    residual = Full(width, layers) if size is None else Block(width, layers, size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    with torch.no_grad():
        for read in residual.double().reads:
            read.query.copy_(scale * torch.randn(width, generator=generator, dtype=torch.float64))
    magnitudes = 10 ** draw(
        st.lists(st.floats(-3, 3), min_size=layers + 1, max_size=layers + 1).map(torch.tensor)
    )
    sources = torch.randn(layers + 1, 1, 2, width, generator=generator, dtype=torch.float64)
    return residual, list(sources * magnitudes.double()[:, None, None, None])


@settings(max_examples=40, deadline=None)
@given(streams())
def test_rows_sum_to_one_and_states_stay_within_the_largest_source(case):
    residual, sources = case
    states, weights = run_stream(residual, sources)
    for weight in weights:
        assert (weight >= 0).all()
        torch.testing.assert_close(weight.sum(0), torch.ones_like(weight[0]))
    size = getattr(residual, "layers_per_block", 1)
    for layer, state in enumerate(states):
        blocks = [
            torch.stack(sources[i : min(i + size, layer + 1)]).sum(0) for i in range(1, layer + 1, size)
        ]
        largest = torch.stack([sources[0], *blocks]).norm(dim=-1).amax(0)
        assert (state.norm(dim=-1) <= largest * (1 + 1e-12)).all()


@settings(max_examples=30, deadline=None)
@given(streams(), st.floats(0.01, 100))
def test_weights_look_at_directions_and_mixes_at_sizes(case, factor):
    """Keys are normalised and values are not: scaling all sources scales the states, not the weights."""
    residual, sources = case
    for read in residual.reads:
        read.eps = 0.0
    states, weights = run_stream(residual, sources)
    scaled_states, scaled_weights = run_stream(residual, [factor * source for source in sources])
    torch.testing.assert_close(scaled_weights, weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scaled_states, [factor * s for s in states], rtol=1e-6, atol=1e-9 * factor)


@given(st.integers(1, 40), st.integers(1, 45))
@settings(max_examples=40, deadline=None)
def test_source_counts_of_block(layers, size):
    counts = [read.depth_sources for read in Block(2, layers, size).reads]
    assert counts[0] == 1
    assert counts[-1] == 1 + -(-layers // size)
    # The source count grows by one just after the first layer of each depth block.
    assert [b - a for a, b in itertools.pairwise(counts)] == [int(i % size == 0) for i in range(layers)]


def step_zero_deviation(model, baseline, inputs):
    """The largest relative difference between two models in logits and in gradients of shared parameters."""
    differences = [(model(inputs), baseline(inputs))]
    for each in (model, baseline):
        loss_of(each(inputs), inputs).backward()
    shared = dict(model.named_parameters())
    differences += [(shared[name].grad, p.grad) for name, p in baseline.named_parameters()]
    return max(((one - other).norm() / other.norm()).item() for one, other in differences)


def step_zero_pair(**residual):
    """An AttnRes model with zero queries and a PreNorm one with the same shared weights, eps negligible."""
    baseline = lively_decoder(residual="prenorm", norm_eps=NEGLIGIBLE_EPS)
    model = seeded_decoder(norm_eps=NEGLIGIBLE_EPS, **residual).double()
    missing, unexpected = model.load_state_dict(baseline.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("residual.") for name in missing)
    return model, baseline


@pytest.mark.parametrize("kind", ATTNRES)
def test_at_step_zero_attnres_is_the_ordinary_residual(kind):
    model, baseline = step_zero_pair(**RESIDUALS[kind])
    assert step_zero_deviation(model, baseline, tokens()) <= 1e-9


class DuplicatedEmbedding(Full):
    """A known mistake: the embedding is listed as a finished block and as the running partial."""

    def open(self, embedding, queries=None):
        stream = FullStream(self.reads, self.queries(), embedding)
        stream.commit(embedding)
        return stream


def test_a_duplicated_embedding_is_caught_at_step_zero():
    model, baseline = step_zero_pair(residual="full")
    wrong = DuplicatedEmbedding(model.config.width, model.config.layers, NEGLIGIBLE_EPS).double()
    wrong.load_state_dict(model.residual.state_dict())
    model.residual = wrong
    assert step_zero_deviation(model, baseline, tokens()) > 1e-2


@pytest.mark.parametrize("kind", ATTNRES)
def test_zero_queries_can_learn_and_the_first_has_nothing_to_learn(kind):
    model, inputs = seeded_decoder(**RESIDUALS[kind]).double(), tokens()
    loss_of(model(inputs), inputs).backward()
    first, *later = model.residual.reads
    assert torch.equal(first.query.grad, torch.zeros_like(first.query))
    assert all(read.query.grad.norm() > 0 for read in later)


def test_the_read_protocol():
    read = DepthAttention(width=3, depth_sources=2)
    sources = [torch.ones(1, 2, 3), torch.zeros(1, 2, 3)]
    mix, weight = read(sources, torch.zeros(2, 1, 2))
    assert read.depth_sources == 2
    assert torch.equal(mix, torch.full((1, 2, 3), 0.5))
    assert torch.equal(weight, torch.full((2, 1, 2), 0.5))
