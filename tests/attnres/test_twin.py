"""The streams against the definition, in float64: states, outputs, weights, logits and every gradient."""

import pytest
import torch

from attnres.definition import depth_attention, rms_norm
from attnres.logits import source_logits
from attnres.mixing import softmax_mix
from tests.attnres.models import ATTNRES, RESIDUALS, defined_pass, lively_decoder, loss_of, tokens


def observed(model, inputs):
    """What hooks see of one forward pass: states, outputs, sources and weights of reads; and the logits."""
    seen = {"states": [], "outputs": [], "weights": [], "sources": []}
    handles = []
    for block in model.blocks:
        for norm, layer in ((block.attention_norm, block.attention), (block.mlp_norm, block.mlp)):
            handles.append(norm.register_forward_hook(lambda m, args, out: seen["states"].append(args[0])))
            handles.append(layer.register_forward_hook(lambda m, args, out: seen["outputs"].append(out)))
    handles.append(
        model.final_norm.register_forward_hook(lambda m, args, out: seen["states"].append(args[0]))
    )
    for read in getattr(model.residual, "reads", []):
        handles.append(read.register_forward_hook(lambda m, args, out: seen["sources"].append(args[0])))
        handles.append(read.register_forward_hook(lambda m, args, out: seen["weights"].append(out[1])))
    logits = model(inputs)
    for handle in handles:
        handle.remove()
    return logits, seen


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_the_model_is_the_definition(kind):
    model, inputs = lively_decoder(**RESIDUALS[kind]), tokens()
    logits, seen = observed(model, inputs)
    twin = defined_pass(model, model.embedding(inputs))
    defined_logits = model.head(model.final_norm(twin.final_state))

    assert_close(logits, defined_logits)
    assert_close(seen["states"], [*twin.states, twin.final_state])
    assert_close(seen["outputs"], twin.outputs)
    if kind in ATTNRES:
        assert_close(seen["weights"], twin.weights)

    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(loss_of(logits, inputs), parameters)
    theirs = torch.autograd.grad(loss_of(defined_logits, inputs), parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ATTNRES)
def test_every_read_is_called_with_as_many_sources_as_it_says(kind):
    model = lively_decoder(**RESIDUALS[kind])
    _, seen = observed(model, tokens())
    said = [read.depth_sources for read in model.residual.reads]
    assert len(said) == model.config.layers + 1
    assert [len(sources) for sources in seen["sources"]] == said
    assert [len(weight) for weight in seen["weights"]] == said


def test_blocks_of_one_layer_are_full():
    full, block = lively_decoder(residual="full"), lively_decoder(residual="block", layers_per_block=1)
    block.load_state_dict(full.state_dict())
    inputs = tokens()
    assert torch.equal(full(inputs), block(inputs))


def test_the_first_state_is_a_new_tensor_equal_to_the_embedding():
    model, inputs = lively_decoder(residual="full"), tokens()
    _, seen = observed(model, inputs)
    assert torch.equal(seen["states"][0], model.embedding(inputs))
    assert seen["states"][0] is not seen["sources"][0][0]
    assert torch.equal(seen["weights"][0], torch.ones(1, *inputs.shape, dtype=torch.float64))


def test_the_logits_of_a_source_have_the_gradients_of_their_formula():
    source = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    stacked = lambda source, queries: torch.stack(source_logits(source, queries, 1e-3))  # noqa: E731
    torch.testing.assert_close(
        stacked(source, queries), (rms_norm(source, 1e-3) @ queries.T).permute(2, 0, 1)
    )
    assert torch.autograd.gradcheck(stacked, (source, queries))


def test_a_mix_has_the_gradients_of_its_formula_and_its_weights_too():
    """Also what goes through the weights alone, as a loss on their entropy does."""
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    sources = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    both = lambda logits, *sources: softmax_mix(sources, logits)  # noqa: E731
    mix, weight = both(logits, *sources)
    torch.testing.assert_close(weight, logits.softmax(0))
    torch.testing.assert_close(mix, (weight.unsqueeze(-1) * torch.stack(sources)).sum(0))
    assert torch.autograd.gradcheck(both, (logits, *sources))
    assert torch.autograd.gradcheck(lambda *given: both(*given)[1], (logits, *sources))


def test_a_mix_of_several_dtypes_has_that_of_the_first():
    logits = torch.randn(2, 1, 4, requires_grad=True)
    sources = [torch.randn(1, 4, 64, requires_grad=True), torch.randn(1, 4, 64).bfloat16().requires_grad_()]
    mix, _ = softmax_mix(sources, logits)
    exact, _ = softmax_mix([source.double() for source in sources], logits.double())
    assert mix.dtype == torch.float32
    torch.testing.assert_close(mix, exact.float())
    gradients = torch.autograd.grad(mix.square().sum(), [logits, *sources])
    assert [each.dtype for each in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    exact = torch.autograd.grad(exact.square().sum(), [logits, *sources])
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=1e-3)


def test_a_second_derivative_is_refused_instead_of_wrong():
    source, queries = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    (logits,) = source_logits(source, queries, 1e-6)
    (gradient,) = torch.autograd.grad(logits.square().sum(), source, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_source_of_zeros_has_logits_of_zero_and_finite_gradients():
    source = torch.zeros(1, 2, 4, requires_grad=True)
    (logits,) = source_logits(source, torch.ones(1, 4), 1e-6)
    logits.sum().backward()
    assert torch.equal(logits, torch.zeros(1, 2))
    assert source.grad.isfinite().all()


def test_one_read_of_the_definition_by_hand():
    """Two one-channel sources, 3 and -4: keys are their signs, so the weights are those of logits ±q."""
    sources = [torch.tensor([[[3.0]]], dtype=torch.float64), torch.tensor([[[-4.0]]], dtype=torch.float64)]
    mix, weight = depth_attention(torch.tensor([0.5 * 1.0986122886681098], dtype=torch.float64), sources, 0.0)
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.75, 0.25], dtype=torch.float64))
    torch.testing.assert_close(mix.item(), 0.75 * 3 - 0.25 * 4)
