"""Converted models compiled: gradients against the twin, with and without checkpointing."""

import pytest
import torch

from tests.attnres.converted import checked, checkpointed, compiled, gradients, loss_of, prepared
from tests.attnres.families import FAMILIES, logits_of

pytest.importorskip("transformers")

COMPILED = [("Llama", "block of 4, ragged", True)]
COMPILED_LONG = [
    (name, kind, recomputes)
    for name in FAMILIES
    for kind in ("full", "block of 3, across transformer blocks", "block of 4, ragged")
    for recomputes in (False, True)
    if (name, kind, recomputes) not in COMPILED
]


@pytest.mark.parametrize(
    ("name", "kind", "recomputes"),
    [*COMPILED, *(pytest.param(*case, marks=pytest.mark.long) for case in COMPILED_LONG)],
)
def test_compiled_gradients(name, kind, recomputes):
    """DiT's checkpointing is its author's own call of `checkpoint(block, ...)`."""
    checked(name, kind, lambda m: compiled(checkpointed(m) if recomputes else m, name, recomputes))


@pytest.mark.parametrize("tokens", [7, pytest.param(40, marks=pytest.mark.long)])
def test_compiled_without_gradients(tokens):
    """As in generation, where a few tokens take other sums than many."""
    _, _, model, inputs = prepared("Llama", "block of 3, across transformer blocks")
    inputs = {"input_ids": inputs["input_ids"].repeat(1, 6)[:, :tokens]}
    with torch.no_grad():
        expected = logits_of(model(**inputs))
        torch.testing.assert_close(
            logits_of(compiled(model, "Llama")(**inputs)), expected, rtol=1e-5, atol=1e-7
        )


def test_a_checkpointed_block_is_one_graph_where_the_compiler_is_told_that_it_may():
    torch._dynamo.reset()
    whole = lambda model: torch.compile(checkpointed(model), backend="aot_eager", fullgraph=True)  # noqa: E731
    # pytest's monkeypatch would delete the setting afterwards.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        checked("DiT", "block of 3, across transformer blocks", whole)


@pytest.mark.long
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "DiT"])
def test_gradients_of_machine_code(name, recomputes):
    kind = "block of 3, across transformer blocks"
    checked(
        name, kind, lambda m: compiled(checkpointed(m) if recomputes else m, name, recomputes, "inductor")
    )


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_compiled_forwards_before_their_backwards(recomputes):
    _, _, model, inputs = prepared("Llama", "block of 3, across transformer blocks")
    parameters, other = list(model.parameters()), {"input_ids": inputs["input_ids"].flip(1)}
    alone = [gradients(loss_of(model, x), parameters) for x in (inputs, other)]
    run = compiled(checkpointed(model) if recomputes else model, "Llama")
    losses = [loss_of(run, x) for x in (inputs, other)]
    together = [gradients(loss, parameters) for loss in losses]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-9)
