"""bfloat16, memory, meta tensors and torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attnres.logits import source_logits
from tests.attnres.models import RESIDUALS, loss_of, seeded_decoder, tokens

KINDS = ["prenorm", "full", "block of 4, ragged", "postnorm", "deepnorm", "rescaled"]


def routed(model):
    """The model with queries that prefer some sources."""
    torch.manual_seed(1)
    with torch.no_grad():
        for read in getattr(model.residual, "reads", []):
            read.query.normal_()
    return model


def relative(one, other):
    return ((one.float() - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_stays_near_float32(kind):
    model, inputs = routed(seeded_decoder(**RESIDUALS[kind])), tokens()
    exact = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(inputs)
    assert rounded.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 2**-8 for each of a few roundings in a row.
    assert 0 < relative(rounded, exact) < 6 * 2**-8


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_stays_near_float32(kind):
    model, inputs = routed(seeded_decoder(**RESIDUALS[kind])), tokens()
    exact = model(inputs)
    assert 0 < relative(model.bfloat16()(inputs), exact) < 8 * 2**-8


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_a_bfloat16_source_are_computed_in_float32(autocast):
    torch.manual_seed(0)
    source, queries = torch.randn(2, 3, 64).bfloat16(), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = torch.stack(source_logits(source, queries, 1e-6))
    exact = torch.stack(source_logits(source.double(), queries.double(), 1e-6))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-5)


def test_backward_keeps_no_float32_copy_of_a_bfloat16_source():
    kept = []
    source = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    queries = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        source_logits(source, queries, 1e-6)
    wide = [t for t in kept if t.numel() >= source.numel()]
    assert [t.dtype for t in wide] == [torch.bfloat16]
    assert wide[0].data_ptr() == source.data_ptr()


def test_a_mix_has_the_dtype_of_the_embedding_and_weights_of_float32():
    model = seeded_decoder(residual="block", layers_per_block=2)
    seen = []
    for read in model.residual.reads:
        read.register_forward_hook(lambda m, args, out: seen.append((out[0].dtype, out[1].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    model.bfloat16()(tokens())
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_partial_sums_are_kept_in_the_dtype_of_the_embedding():
    model, newest = seeded_decoder(residual="block", layers_per_block=3), []
    for read in model.residual.reads:
        read.register_forward_hook(lambda m, args, out: newest.append(args[0][-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    assert set(newest) == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_reads_nothing_back_from_the_device(kind):
    """Meta tensors have no values: a host read would raise."""
    model = seeded_decoder(**RESIDUALS[kind]).to("meta")
    inputs = tokens().to("meta")
    loss_of(model(inputs), inputs).backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())


COMPILED = [{"residual": "prenorm"}, {"residual": "full"}, {"residual": "block", "layers_per_block": 3}]


def check_compiled(residual, backend):
    """One graph, and the eager loss and gradients; four layers, so that blocks of three are ragged."""
    torch._dynamo.reset()
    model, inputs = routed(seeded_decoder(blocks=2, **residual)), tokens()
    loss = loss_of(model(inputs), inputs)
    eager = torch.autograd.grad(loss, list(model.parameters()))
    counter = CompileCounterWithBackend(backend)
    compiled_loss = loss_of(torch.compile(model, backend=counter, fullgraph=True)(inputs), inputs)
    compiled = torch.autograd.grad(compiled_loss, list(model.parameters()))
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", COMPILED, ids=lambda each: each["residual"])
def test_a_model_compiles_to_one_graph(residual):
    check_compiled(residual, "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("residual", COMPILED, ids=lambda each: each["residual"])
def test_a_model_compiles_to_machine_code(residual):
    check_compiled(residual, "inductor")
