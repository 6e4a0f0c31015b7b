"""Frames hold the numbers that were recorded, at the places the vocabulary gives them."""

import numpy as np
import pytest

from app import frames
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made


@pytest.fixture
def tiny(tmp_path):
    """Two transformer blocks of Full AttnRes; every number is chosen by hand."""
    shape = made.layout("full", 2)
    writer = RunWriter(tmp_path / "tiny", Manifest(shape, 0.0, 10, 20))
    weight = np.tril(np.ones((5, 5)))
    weight /= weight.sum(axis=1, keepdims=True)
    later = weight.copy()
    later[3] = [0.1, 0.6, 0.1, 0.2, 0]
    rows = [
        ("hidden_rms", 0, np.array([1, 2, 3, 4, 5])),
        ("hidden_rms", 10, np.array([1, 2, 4, 8, np.inf])),
        ("output_grad_rms", 0, np.array([100, 1, 2, 3, 4])),
        ("depth_weight", 0, shape.pack(weight)),
        ("depth_weight", 20, shape.pack(later)),
        ("contribution_rms", 20, shape.pack(2 * later)),
        *(("loss", step, np.float32(10 - step)) for step in range(5)),
    ]
    writer.put(lambda: rows, 20)
    writer.close("finished")
    return open_run(tmp_path / "tiny")


def test_profile_takes_the_nearest_step_not_after_the_asked_one(tiny):
    frame = frames.profile(tiny, "tiny", "hidden_rms", 9)
    assert frame["step"].unique().tolist() == [0]
    assert frame["depth"].tolist() == [1, 2, 3, 4, 5]
    assert frame["value"].tolist() == [1, 2, 3, 4, 5]
    assert frame["place"].tolist()[0] == "into layer 1 (attention)"
    assert frame["place"].tolist()[-1] == "final state"


def test_infinite_values_become_blanks(tiny):
    assert np.isnan(frames.profile(tiny, "tiny", "hidden_rms", 10)["value"].iloc[-1])


def test_nothing_recorded_gives_no_rows(tiny):
    assert frames.profile(tiny, "tiny", "output_rms", 10).empty
    assert frames.over_training(tiny, "output_rms").empty
    assert frames.evenness(tiny, "tiny", "param_grad_norm").empty
    assert frames.scalar(tiny, "tiny", "val_loss").empty


def test_outputs_count_from_the_embedding(tiny):
    frame = frames.profile(tiny, "tiny", "output_grad_rms", 0)
    assert list(zip(frame["depth"], frame["place"], strict=True))[:2] == [
        (0, "embedding"),
        (1, "layer 1 (attention)"),
    ]


def test_evenness_leaves_the_embedding_out(tiny):
    row = frames.evenness(tiny, "tiny", "output_grad_rms").iloc[0]
    assert row["ratio"] == 4
    assert row["cv"] == pytest.approx(np.std([1, 2, 3, 4]) / 2.5)


def test_grid_covers_every_step_and_place(tiny):
    grid = frames.over_training(tiny, "hidden_rms")
    assert len(grid) == 10
    assert grid[["step", "until"]].drop_duplicates().to_numpy().tolist() == [[0, 10], [10, 20]]
    assert grid[(grid["step"] == 10) & (grid["depth"] == 4)]["value"].item() == 8


def test_cells_are_exactly_those_that_exist(tiny):
    cells = frames.cells(tiny, 25)
    assert len(cells) == 15
    assert cells["step"].unique().tolist() == [20]
    row = cells[(cells["read"] == "layer 4 (MLP)") & (cells["from"] == "layer 1 (attention)")].iloc[0]
    assert row["depth_weight"] == pytest.approx(0.6)
    assert row["contribution_rms"] == pytest.approx(1.2)
    assert cells.groupby("row", observed=True)["depth_weight"].sum().tolist() == pytest.approx([1] * 5)
    assert cells.loc[cells["newest"], "source"].tolist() == [0, 1, 2, 3, 4]


def test_attention_and_mlp_reads_are_separable(tiny):
    cells = frames.cells(tiny, 20, "mlp")
    assert list(dict.fromkeys(cells["read"])) == ["layer 2 (MLP)", "layer 4 (MLP)", "final read"]
    assert cells["row"].max() == 2


def test_a_metric_of_another_step_is_blank(tiny):
    assert frames.cells(tiny, 0)["contribution_rms"].isna().all()


def test_long_lines_are_thinned_with_their_extremes_kept(tmp_path):
    writer = RunWriter(tmp_path / "long", Manifest(made.layout("full", 1), 0.0, 1, 1))
    values = np.sin(np.arange(9_000) / 50).astype(np.float32)
    values[4_321] = 50
    writer.put(lambda: [("loss", step, value) for step, value in enumerate(values)], 9_000)
    writer.close("finished")
    frame = frames.scalar(open_run(tmp_path / "long"), "long", "loss")
    assert len(frame) == frames.POINTS
    assert frame["high"].max() == 50
    assert frame["low"].min() == pytest.approx(-1, abs=1e-3)
    assert ((frame["low"] <= frame["value"]) & (frame["value"] <= frame["high"])).all()
    stops = frames.stops([open_run(tmp_path / "long")], ["loss"])
    assert len(stops) == frames.STOPS and stops[0] == 0 and stops[-1] == 8_999


def test_wide_grids_are_averaged(tmp_path):
    path = made.run(tmp_path / "run", "prenorm", blocks=2, steps=250, every=1)
    grid = frames.over_training(open_run(path), "hidden_rms")
    assert grid["step"].nunique() == frames.COLUMNS
    assert grid["until"].max() >= 250
