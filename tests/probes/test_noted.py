"""What a model notes of its own values, for its logs or its caller, changes nothing that is recorded."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import probes
from tests.probes.models import batches, loss_of, sgd
from tests.probes.test_made import Inline, rms_norm


def without_gradient(x):
    with torch.no_grad():
        return x.clone()


NOTES = {
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "cloned": lambda x: x.clone(),
    "in another precision": lambda x: x.double(),
    "without gradient": without_gradient,
    "on the host": lambda x: x.detach().cpu().clone(),
    "scaled": lambda x: 0.5 * x.detach(),
    "as it is": lambda x: x,
    "a number": lambda x: x.detach().square().mean().sqrt().item(),
    "printed": lambda x: f"{x} {x.norm():.3f}",
}


class Noting(Inline):
    """Notes its sources, weights and states."""

    def __init__(self, note):
        super().__init__()
        self.note, self.notes, self.true = note, [], []

    def read(self, sources, row):
        values = torch.stack(sources)
        weights = (rms_norm(values) @ self.queries[row]).softmax(0)
        state = (weights.unsqueeze(-1) * values).sum(0)
        self.notes += [self.note(sources[-1]), self.note(weights), self.note(state)]
        self.true.append(np.sqrt(np.mean(np.square(state.tolist()))))
        return rms_norm(state)

    def forward(self, tokens):
        self.notes, self.true = [], []
        return super().forward(tokens)


class Returning(Noting):
    def forward(self, tokens):
        return super().forward(tokens), self.notes


@dataclass
class Told:
    """No tuple, no dict: nobody sees what is in it."""

    logits: Tensor
    notes: list


class Wrapping(Noting):
    def forward(self, tokens):
        return Told(super().forward(tokens), self.notes)


LOGITS = {
    Noting: lambda result: result,
    Returning: lambda result: result[0],
    Wrapping: lambda result: result.logits,
}


@pytest.mark.parametrize(
    ("model", "note"),
    [
        *((Noting, note) for note in NOTES),
        (Returning, "detached"),
        (Wrapping, "detached"),
        (Returning, "scaled"),
    ],
)
def test_what_is_noted_is_no_state(model, note, tmp_path):
    torch.manual_seed(0)
    model = model(NOTES[note])
    (tokens,) = batches(0, [(2, 7)])
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, strict=True):
        loss_of(LOGITS[type(model)](model(tokens)), tokens).backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run["hidden_rms"][0], model.true, rtol=1e-5)
    exists = np.tri(5, dtype=bool)
    np.testing.assert_allclose(run["mixing_weight"][0][exists], run["depth_weight"][0][exists], atol=1e-5)
    assert run.reads[0].layer == 1 and [read.sources for read in run.reads] == [1, 2, 3, 4, 5]
