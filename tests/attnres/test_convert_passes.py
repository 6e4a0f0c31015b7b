"""Passes of a converted model that run again, without gradients, or one before the other's backward."""

import pytest
import torch
from torch import nn

from tests.attnres.converted import RESIDUALS, checked, checkpointed, gradients, loss_of, prepared
from tests.attnres.families import FAMILIES, logits_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients(name, kind):
    checked(name, kind, checkpointed)


def test_checkpointed_inside_the_blocks_own_forward():
    _, _, model, inputs = prepared("DiT", "block of 3, across transformer blocks")
    plain = gradients(loss_of(model, inputs), list(model.parameters()))
    for block in model.blocks:
        call = block.forward
        block.forward = lambda *args, f=call: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    checkpointed = gradients(loss_of(model, inputs), list(model.parameters()))
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_reentrant_checkpointing_is_refused(name):
    _, _, model, inputs = prepared(name)
    checkpointed(model, reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        loss_of(model, inputs).backward()


def test_an_embedding_that_requires_gradients_does_not_keep_it_from_running_without_any():
    """As under transformers' enable_input_require_grads, which fine-tuning of adapters switches on."""
    _, _, model, inputs = prepared("Llama")
    expected = logits_of(model(**inputs)).detach()
    model.enable_input_require_grads()
    with torch.no_grad():
        assert torch.equal(logits_of(model(**inputs)), expected)


class Unrecorded(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.block(*args, **kwargs)


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_alone_runs_without_gradients_is_refused(index):
    """The queries' gradients would be lost, all of them where it is the first block."""
    _, _, model, inputs = prepared("Llama", "block of 2")
    model.model.embed_tokens.requires_grad_(False)
    block = model.model.layers[index]
    assert logits_of(model(**inputs)).requires_grad
    model.model.layers[index] = Unrecorded(block)
    with pytest.raises(RuntimeError, match="gradients of sources and queries would be lost"):
        model(**inputs)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_two_forwards_before_their_backwards(kind, recomputes):
    _, _, model, inputs = prepared("Llama", kind)
    if recomputes:
        checkpointed(model)
    parameters, other = list(model.parameters()), {"input_ids": inputs["input_ids"].flip(1)[:1, :5]}
    alone = [gradients(loss_of(model, x), parameters) for x in (inputs, other)]
    losses = [loss_of(model, x) for x in (inputs, other)]
    together = [gradients(loss, parameters) for loss in losses]
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
