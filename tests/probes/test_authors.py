"""Depth weights of models in the manner of many authors, against their own; and models that have none."""

import copy

import numpy as np
import pytest
import torch

import probes
from probes.foreign import foreign_sites
from probes.symbols import Untraceable
from tests.probes.foreign_families import rms
from tests.probes.foreign_sources import SOURCES, FallingBack, Gated
from tests.probes.foreign_streams import NO_READS, Highway
from tests.probes.foreign_weights import WEIGHTS, Heads, WithNull
from tests.probes.hyper import Hyper
from tests.probes.models import sgd
from tests.probes.test_foreign import TOLERANCE, recorded, step, tokens

AUTHORS = SOURCES | WEIGHTS


def own_and_found(author, path):
    torch.manual_seed(1)
    model, batch = author(), tokens(3, 10)
    twin = copy.deepcopy(model)
    twin.own = []
    twin(batch, batch)
    own = [weight.flatten(1).numpy() for weight in twin.own]
    run = recorded(model, path, batch)
    rows = [
        (run["depth_weight"][0][row][: read.sources], run["depth_weight_std"][0][row][: read.sources])
        for row, read in enumerate(run.reads)
    ]
    return run, own, rows


def is_own(row, weight) -> bool:
    mean, std = row
    return (
        len(mean) == len(weight)
        and np.allclose(mean, weight.mean(1), atol=TOLERANCE)
        and np.allclose(std, weight.std(1), atol=1e-3)
    )


@pytest.mark.parametrize("author", AUTHORS)
def test_every_read_is_the_models_own(author, tmp_path):
    run, own, rows = own_and_found(AUTHORS[author], tmp_path / "run")
    for weight in own:
        assert any(is_own(row, weight) for row in rows), weight.mean(1)
    several = [row for row, read in zip(rows, run.reads, strict=True) if read.sources > 1]
    assert len(several) == sum(len(weight) > 1 for weight in own)
    assert np.nanmax(run["read_error"][0]) < 1e-5
    # What is no row of the model's own is a layer that receives the embedding as it is, or that it reads with weight 1.
    for row, read in zip(rows, run.reads, strict=True):
        assert any(is_own(row, weight) for weight in own) or (read.sources == 1 and row[0] == 1)


def test_hyper_connections_say_why_they_have_no_depth_weights():
    assert "the stream is mixed by its blocks, which no read weighs alone" in str(probes.describe(Hyper()))


@pytest.mark.parametrize("model", NO_READS)
def test_streams_that_are_carried_on_with_weights_are_no_reads(model):
    with pytest.raises(Untraceable, match="scaled, gated or mixed on their way") as refused:
        foreign_sites(NO_READS[model]())
    assert "recovered" not in str(refused.value)  # nothing of it is recorded then


class TwoAtOnce(Highway):
    """A plain residual in the model's own forward, of layers side by side."""

    def stream(self, x):
        for i in range(0, len(self.sublayers) - 1, 2):
            read = rms(x)
            x = x + self.sublayers[i](read) + self.sublayers[i + 1](read)
        return x


def test_a_plain_residual_is_no_read():
    with pytest.raises(Untraceable, match="no state in it is a weighted sum of several sources"):
        foreign_sites(TwoAtOnce())


def test_a_gate_is_named_and_the_state_is_what_the_layer_receives(tmp_path):
    described = str(probes.describe(Gated()))
    assert "reads that are part of a state" in described
    run = own_and_found(Gated, tmp_path / "run")[0]
    assert [layer.kind for layer in run.layers] == ["attention", "mlp"] * 2


def test_layers_before_the_first_read_have_none(tmp_path):
    run = own_and_found(FallingBack, tmp_path / "run")[0]
    assert [read.layer for read in run.reads] == [5, 6, 7, 8]
    assert len(run.layers) == 8


def test_a_learned_vector_has_a_column_before_the_embedding(tmp_path):
    run = own_and_found(WithNull, tmp_path / "run")[0]
    assert [source.label for source in run.sources] == [
        "learned vector", "embedding", "layer 1 (attention)", "layer 2 (MLP)", "layer 3 (attention)", "layer 4 (MLP)",
    ]  # fmt: skip


def test_dropout_on_the_weights_of_heads_leaves_their_rows_blank(tmp_path):
    class Dropped(Heads):
        def mix(self, sources, read):
            values = torch.stack(sources).unflatten(-1, (4, -1))
            weight = torch.nn.functional.dropout(values.sum(-1).softmax(0), 0.5, self.training)
            return torch.einsum("nbth,nbthk->bthk", weight, values).flatten(-2)

    run = recorded(Dropped(), tmp_path / "run", tokens(3, 10))
    assert run["read_error"][0].min() > 1e-2
    assert "depth_weight" not in run.metrics or np.isnan(run["depth_weight"][0]).all()


@pytest.mark.long
def test_heads_are_seen_in_compiled_training(tmp_path):
    torch._dynamo.reset()
    model, batch = Heads(), tokens(3, 10)
    twin = copy.deepcopy(model)
    twin.own = []
    twin(batch, batch)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, strict=True):
        model.compile(fullgraph=True, backend="aot_eager")
        step(model, optimizer, batch)
    torch._dynamo.reset()
    run = probes.open_run(tmp_path / "run")
    for row, weight in zip(run["depth_weight"][0], twin.own, strict=True):
        np.testing.assert_allclose(row[: len(weight)], weight.flatten(1).mean(1), atol=TOLERANCE)
