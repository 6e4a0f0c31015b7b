"""Depth weights of mixes that are projected before their layer, as by attention modules over depth."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probes
from tests.probes.foreign import unit
from tests.probes.foreign_families import WIDTH, Family
from tests.probes.test_authors import is_own, own_and_found
from tests.probes.test_foreign import recorded, tokens


class Projected(Family):
    """A projection of each mix, by a module."""

    def __init__(self):
        super().__init__()
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def mix(self, sources, read):
        return self.out[read](super().mix(sources, read))


class ProjectedByFunction(Projected):
    def mix(self, sources, read):
        return F.linear(Family.mix(self, sources, read), self.out[read].weight)


class AttentionModule(Family):
    """torch's own, over depth: values and mixes are projected."""

    heads, dropout, quick = 1, 0.0, False

    def __init__(self):
        super().__init__()
        options = {"batch_first": True, "dropout": self.dropout}
        self.over = nn.ModuleList(nn.MultiheadAttention(WIDTH, self.heads, **options) for _ in range(5))

    def mix(self, sources, read):
        values = torch.stack(sources, 2)
        B, T, S, D = values.shape
        values = values.flatten(0, 1)
        query = self.queries[read].view(1, 1, D).expand(B * T, 1, D)
        given = (
            {"need_weights": False} if self.quick and self.own is None else {"average_attn_weights": False}
        )
        mix, weight = self.over[read](query, unit(values), values, **given)
        for head in range(self.heads) if weight is not None else ():
            self.kept(weight[:, head, 0].view(B, T, S).movedim(-1, 0))
        return mix.view(B, T, D)


class AttentionModuleOfHeads(AttentionModule):
    heads = 3


class QuickAttentionModule(AttentionModuleOfHeads):
    """By a kernel that never has the weights."""

    quick = True


class Dropping(AttentionModule):
    dropout = 0.5


@pytest.mark.parametrize(
    "model", [Projected, ProjectedByFunction, AttentionModule, AttentionModuleOfHeads, QuickAttentionModule]
)
def test_weights_are_the_models_own(model, tmp_path):
    run, own, rows = own_and_found(model, tmp_path / "run")
    for weight in own:
        assert any(is_own(row, weight) for row in rows), weight.mean(1)
    assert [read.layer for read in run.reads if "head 2" not in read.label and "head 3" not in read.label] == [
        1, 2, 3, 4, None,
    ]  # fmt: skip
    assert [layer.kind for layer in run.layers][1:] == ["mlp", "attention", "mlp"]
    assert run.reads[-1].label.startswith("final read")
    assert np.nanmax(run["read_error"][0]) < 1e-5
    assert np.isfinite(run["output_rms"][0]).all()


def test_an_attention_module_is_checked_by_what_it_returns(tmp_path):
    """Weights are dropped in it, which nobody knows afterwards."""
    assert "not checked against" not in str(probes.describe(AttentionModule()))
    run = recorded(Dropping(), tmp_path / "run", tokens(3, 10))
    assert run["read_error"][0][1:].min() > 1e-2
    assert "depth_weight" not in run.metrics or np.isnan(run["depth_weight"][0][1:]).all()
