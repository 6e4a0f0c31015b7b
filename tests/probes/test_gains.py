"""A norm before the first read, written by hand and with a gain that is one yet, is no read of one source."""

import numpy as np
import pytest
import torch
from torch import nn

import probes
from tests.probes.foreign import unit
from tests.probes.foreign_families import WIDTH, ReadAfter
from tests.probes.models import sgd
from tests.probes.test_foreign import step, tokens


class Norm(nn.Module):
    def __init__(self, learned: bool):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH), requires_grad=learned)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class ByHand(ReadAfter):
    """With `values`, what is mixed is normalised too. Its embedding has the size that a norm gives it."""

    def __init__(self, values: bool, learned: bool):
        super().__init__()
        self.norms = nn.ModuleList(Norm(learned) for _ in self.sublayers)
        self.key_norm = Norm(learned) if values else nn.Identity()
        self.embedding.weight.data = unit(self.embedding.weight.data)

    def mix(self, sources, read):
        values = self.key_norm(torch.stack(sources))
        weight = (unit(values) @ self.queries[read]).softmax(0)
        return torch.einsum("sbt,sbtd->btd", weight, values)


@pytest.mark.parametrize("values", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("learned", [False, True], ids=["frozen gain", "gain"])
def test_a_norm_of_one_source_is_no_read(values, learned, tmp_path, caplog):
    model = ByHand(values, learned)
    found = str(probes.describe(model))
    assert "in norms.0" not in found and "read module norms.0" not in found and "input of norms.0" in found
    batch, optimizer = tokens(3, 10), sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        for _ in range(3):
            step(model, optimizer, batch)
            for norm in model.norms:
                norm.gain.data.mul_(1 + torch.rand(WIDTH))
    run = probes.open_run(tmp_path / "run")
    assert [read.sources for read in run.reads] == [1, 2, 3, 4, 5]
    assert np.nanmax(run["read_error"]) < 1e-5 and not np.isnan(run["depth_weight"][:, :, 0]).any()
    assert "do not give back" not in caplog.text
