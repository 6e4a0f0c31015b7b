"""Sources that get their gradient from all reads at once: against reads of one stack, by autograd itself, whatever a
backward pass comes by."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnres.definition import rms_norm
from attnres.linked import scored
from attnres.mixing import softmax_mix
from attnres.residual import Block, Full

RESIDUALS = {
    "full": lambda: Full(4, 4),
    "block of 2": lambda: Block(4, 4, 2),
    "block of 3": lambda: Block(4, 4, 3),
}
each_residual = pytest.mark.parametrize("make", RESIDUALS.values(), ids=RESIDUALS)


class Pass:
    """A pass of four layers, and everything that has a gradient in it."""

    def __init__(self, residual, schedule, frozen=(), reads=1, weighs=False):
        residual.schedule = schedule
        torch.manual_seed(1)
        self.scales = [
            torch.randn(4, dtype=torch.float64, requires_grad=row not in frozen) for row in range(5)
        ]
        embedding = torch.randn(1, 3, 4, dtype=torch.float64) * self.scales[0]
        self.sources, self.states = [embedding], []
        self.weights = []
        for read in residual.reads if weighs else ():
            read.register_forward_hook(lambda m, args, out: self.weights.append(out[1]))
        self.stream = stream = residual.open(embedding)
        for scale in self.scales[1:]:
            states = [stream.read() for _ in range(reads)]
            self.states += states
            self.sources.append(sum(states).detach() * scale if frozen else sum(states).sin() * scale)
            stream.write(self.sources[-1])
        self.states.append(stream.read())
        self.parameters = [*residual.parameters(), *(s for s in self.scales if s.requires_grad)]

    def loss(self, *rows):
        torch.manual_seed(2)
        return sum((self.states[row] * torch.randn(4, dtype=torch.float64)).sum() for row in rows)


def pair(make, **how):
    residual = make().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.normal_()
    return [Pass(copy.deepcopy(residual), schedule, **how) for schedule in ("no_stack", "stack")]


def same(ours, theirs):
    """No gradient at all is one of zeros."""
    for one, other in zip(ours, theirs, strict=True):
        if one is not None or other is not None:
            one, other = (torch.zeros(()) if each is None else each for each in (one, other))
            torch.testing.assert_close(
                *torch.broadcast_tensors(one.double(), other.double()), rtol=1e-9, atol=1e-12
            )


@each_residual
def test_a_backward_pass_comes_by_some_reads_only_and_the_next_by_others(make):
    """What the pass before has given is not given again."""
    ours, theirs = pair(make)
    for rows in ((4,), (2,), (1, 3), (0, 4), (0,), (4,)):
        grads = [
            torch.autograd.grad(each.loss(*rows), each.parameters, retain_graph=True, allow_unused=True)
            for each in (ours, theirs)
        ]
        same(*grads)


@each_residual
@pytest.mark.parametrize("wanted", range(5))
def test_the_gradient_of_one_source_alone(make, wanted):
    grads = [
        torch.autograd.grad(each.loss(2, 4), each.sources[wanted], allow_unused=True) for each in pair(make)
    ]
    same(*grads)


@each_residual
@pytest.mark.parametrize("frozen", [(0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_sources_without_gradients(make, frozen):
    same(
        *[
            torch.autograd.grad(each.loss(1, 4), each.parameters, allow_unused=True)
            for each in pair(make, frozen=frozen)
        ]
    )


@each_residual
def test_a_read_that_is_made_twice_counts_twice(make):
    same(
        *[
            torch.autograd.grad(each.loss(8), each.parameters, allow_unused=True)
            for each in pair(make, reads=2)
        ]
    )


@each_residual
def test_a_hook_on_a_source_sees_its_whole_gradient_once(make):
    seen = []
    for each in pair(make):
        grads = {}
        for index, source in enumerate(each.sources):
            source.register_hook(lambda g, i=index, grads=grads: grads.setdefault(i, []).append(g))
        each.loss(1, 4).backward()
        assert all(len(given) == 1 for given in grads.values())
        seen.append([grads[index][0] for index in sorted(grads)])
    same(*seen)


@each_residual
def test_a_loss_on_the_weights_alone(make):
    grads = []
    for each in pair(make, weighs=True):
        entropy = sum((weight * weight.log()).sum() for weight in each.weights[1:])
        grads.append(torch.autograd.grad(entropy, each.parameters, retain_graph=True))
        both = entropy + each.loss(3)
        grads[-1] += torch.autograd.grad(both, each.parameters)
    same(*grads)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), 2 * (torch.bfloat16,)]
)
def test_sources_of_several_dtypes(dtypes):
    """As autocast makes them: each gets its gradient in its own, near that of float64."""
    torch.manual_seed(0)
    given = [torch.randn(2, 8, 16).to(dtype) for dtype in (*dtypes, dtypes[1])]
    seen = {}
    for width in (None, torch.float64):
        sources = [(each if width is None else each.to(width)).requires_grad_() for each in given]
        queries = torch.ones(1, 16, dtype=width or torch.float32, requires_grad=True)
        links = [scored(source, queries, 1e-6, sources[0].dtype)[0] for source in sources]
        loss = softmax_mix(sources, links)[0].square().sum()
        seen[width] = torch.autograd.grad(loss, [*sources, queries])
    assert [each.dtype for each in seen[None]] == [*(each.dtype for each in given), torch.float32]
    for one, other in zip(seen[None], seen[torch.float64], strict=True):
        assert (one - other).norm() <= 4 * 2**-8 * other.norm()


def test_sources_that_a_hook_exchanges_get_the_gradients_of_their_own_way():
    """Weights are those of the sources that were shown, the mix is of those that came."""
    torch.manual_seed(0)
    sources = [torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    queries = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    links = [scored(source, queries, 1e-6, torch.float64)[0] for source in sources]
    exchanged = [2 * sources[0], sources[2], sources[1].detach()]
    mix, weights = softmax_mix(exchanged, links)
    plain = torch.stack([rms_norm(source, 1e-6) @ queries[0] for source in sources]).softmax(0)
    expected = (plain.unsqueeze(-1) * torch.stack(exchanged)).sum(0)
    torch.testing.assert_close(weights, plain)
    wanted = [*sources, queries]
    same(*[torch.autograd.grad(each.sin().sum(), wanted, retain_graph=True) for each in (mix, expected)])


@each_residual
def test_checkpointed_reads(make):
    """The reads run twice and give their gradients once."""
    ours, theirs = pair(make)
    state = checkpoint(lambda: ours.stream.read(), use_reentrant=False)
    same(
        torch.autograd.grad(state.sin().sum(), ours.parameters),
        torch.autograd.grad(theirs.states[-1].sin().sum(), theirs.parameters),
    )


def test_all_reads_hand_their_sources_one_tensor():
    """Nothing D wide is written for a pair of read and source: what a backward pass holds at a time grows with the reads."""
    sizes = {}
    for layers in (8, 16):
        residual = Full(64, layers)
        stream = residual.open(torch.randn(1, 64, 64, requires_grad=True))
        for _ in range(layers):
            stream.write(stream.read().sin())
        loss = stream.read().sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        sizes[layers] = sum(max(0, each.self_cpu_memory_usage) for each in profile.events()) / (64 * 64 * 4)
    # By pairs they would be four times as many.
    assert sizes[16] < 2.6 * sizes[8]
