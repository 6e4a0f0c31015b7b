"""Several passes, models and threads in one process: none sees another's depth, nor another's compiled code."""

import threading

import pytest
import torch

import attnres
from tests.attnres.blocks import Block, example, stack


def converted(residual="full", size=None):
    model = attnres.convert(stack(Block, Block, Block), residual, size, example=example())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_(generator=generator)
    return model


@pytest.mark.parametrize("size", [1, 2])
def test_threads_go_through_one_model_side_by_side(size):
    """Both are inside the same block at once, as requests to one server are."""
    model, inputs = converted("block", size), [example(), -3 * example().flip(1)]
    expected, found, meet = [model(x) for x in inputs], {}, threading.Barrier(2, timeout=20)

    def wait(module, args, output):
        meet.wait()

    def run(index):
        found[index] = model(inputs[index])

    for block in model.blocks:
        block.first.register_forward_hook(wait)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return lambda model: torch.compile(model, backend="eager")


def test_the_code_of_a_model_that_is_not_converted_is_not_taken_for_one_that_is(compiled):
    """To compare both in one process is what a twin is for."""
    plain, model = stack(Block, Block), stack(Block, Block)
    before = compiled(plain)(example())
    attnres.convert(model, "block", 2, example=example())
    for _ in range(2):
        torch.testing.assert_close(compiled(model)(example()), model(example()))
        assert torch.equal(compiled(plain)(example()), before)
    assert not torch.allclose(model(example()), before)


@pytest.mark.parametrize("part", ["norm1", pytest.param("norm2", marks=pytest.mark.long)])
def test_parts_may_be_compiled_by_themselves(compiled, part):
    model = converted()
    expected = model(example())
    for block in model.blocks:
        getattr(block, part).compile(backend="eager")
    torch.testing.assert_close(model(example()), expected)


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_model_that_ran_compiled_may_be_converted_and_reverted(compiled, in_place):
    model = stack(Block, Block)
    if in_place:
        model.compile(backend="eager")
    run = model if in_place else compiled(model)
    before = run(example())
    attnres.convert(model, "block", 2, example=example())
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
    torch.testing.assert_close(run(example()), model.forward(example()))
    assert not torch.allclose(run(example()), before)
    attnres.revert(model)
    torch.testing.assert_close(run(example()), before)
