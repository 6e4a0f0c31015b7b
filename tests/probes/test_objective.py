"""What is attributed: which tokens count in the loss, and losses of one's own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from probes.attributed import GRADIENT, REMOVAL
from probes.attribution import attribute
from probes.objective import logits_of, next_token_losses
from tests.attnres.models import RESIDUALS, lively_decoder, tokens


def test_logits_may_come_in_a_dict():
    logits = torch.randn(1, 3, 5)
    for output in ({"loss": None, "logits": logits}, (logits, None), logits):
        assert logits_of(output) is logits
    assert logits_of({"scores": logits}) is None


def test_neither_from_padding_nor_of_it_is_anything_predicted():
    """The left sequence is padded on the left, the right one on the right."""
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = next_token_losses(logits, (ids,), {}, mask)
    assert found.isfinite().tolist() == [[False, False, True, True], [True, True, False, False]]
    assert found[0, 2:].mean().item() == pytest.approx(F.cross_entropy(logits[0, 2:4], ids[0, 3:]).item())


def test_labels_say_what_counts():
    logits, ids = torch.randn(1, 5, 7), torch.randint(7, (1, 5))
    labels = ids.clone()
    labels[0, :3] = -100
    found = next_token_losses(logits, (), {"input_ids": ids, "labels": labels})
    assert found.isfinite().tolist() == [[False, False, True, True]]


class Masked(nn.Module):
    """Takes its mask by position, and heeds it as little as a causal decoder must on the right."""

    def __init__(self):
        super().__init__()
        self.inner = lively_decoder(blocks=1, **RESIDUALS["full"])

    def forward(self, ids, attention_mask=None):
        return self.inner(ids)


def test_a_mask_given_by_position_counts_too():
    ids, mask = tokens(), torch.ones(2, 8, dtype=torch.long)
    mask[:, 5:] = 0
    masked = attribute(Masked(), (ids, mask), methods=[GRADIENT])
    short = attribute(Masked(), ids[:, :5], methods=[GRADIENT])
    assert masked.loss == pytest.approx(short.loss, rel=1e-9)
    assert masked.layers[GRADIENT] == pytest.approx(short.layers[GRADIENT], rel=1e-9)


def test_a_loss_that_is_one_number_is_taken_sequence_by_sequence():
    ids = tokens(batch=3)
    model = lively_decoder(blocks=1, **RESIDUALS["full"])
    square = lambda logits: logits.square().mean()  # noqa: E731
    found = attribute(model, ids, methods=[REMOVAL, GRADIENT], loss=square)
    same = attribute(model, ids, methods=[REMOVAL, GRADIENT], loss=lambda x: x.square().mean((1, 2)))
    for method in (REMOVAL, GRADIENT):
        assert found.layers[method] == pytest.approx(same.layers[method], rel=1e-9)
        assert found.layers_std[method] == pytest.approx(same.layers_std[method], rel=1e-6)
    assert found.about.unit == "units of the target"


def test_what_fails_on_a_late_sequence_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr("probes.work.sequences_that_fit", lambda *_: 1)
    model = lively_decoder(blocks=1, **RESIDUALS["full"])
    ids, wrong = tokens(batch=3), tokens(batch=3)
    wrong[2, 0] = 17
    for given, where in (
        ({"batch": wrong}, "sequences 3 to 3: ValueError: tokens must be from 0 to 16"),
        ({"batch": ids, "what_if": wrong}, "sequences 3 to 3 of the what-if: ValueError"),
    ):
        parts = {}
        with pytest.raises(probes.RunError, match=where):
            attribute(model, methods=[REMOVAL], parts=parts, **given)
        assert not parts


def test_a_detached_loss_has_effects_and_no_slopes():
    model = lively_decoder(blocks=1, **RESIDUALS["full"])
    cut = lambda logits: logits.detach().square().mean((1, 2))  # noqa: E731
    with pytest.raises(probes.RunError, match="The target has no gradient: it is detached"):
        attribute(model, tokens(), methods=[GRADIENT], loss=cut)
    assert np.abs(attribute(model, tokens(), methods=[REMOVAL], loss=cut).layers[REMOVAL]).min() > 0


class Placed(nn.Module):
    """Is given positions [T] and a mask [T, T] that are for all sequences, and a number for each of them."""

    def __init__(self):
        super().__init__()
        self.inner = lively_decoder(blocks=1, **RESIDUALS["full"])
        self.places = nn.Embedding(8, 17, dtype=torch.float64)

    def forward(self, input_ids, positions, mask, warmth):
        logits = self.inner(input_ids) * warmth[:, None, None] + self.places(positions)
        scores = (logits @ logits.mT).masked_fill(mask, -torch.inf)
        return scores.softmax(-1) @ logits


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_what_is_for_all_sequences_is_not_cut(at_once, monkeypatch):
    """Though it is as long as there are sequences."""
    model, ids = Placed(), tokens(batch=8)
    given = torch.arange(8), torch.ones(8, 8, dtype=torch.bool).triu(1), torch.linspace(1, 2, 8)
    assert ids.shape == (8, 8)
    with torch.no_grad():
        true = next_token_losses(model(ids, *given), (ids,), {}).mean().item()
    monkeypatch.setattr("probes.work.sequences_that_fit", lambda *_: at_once)
    named = dict(
        zip(("mask", "positions", "warmth", "input_ids"), (*given[1::-1], given[2], ids), strict=True)
    )
    for batch in ((ids, *given), named):
        assert attribute(model, batch, methods=[REMOVAL]).about.value == pytest.approx(true, rel=1e-9)
