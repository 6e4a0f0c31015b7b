"""Frames hold the numbers that were recorded, at the places the vocabulary gives them."""

import numpy as np
import pytest

from app import frames
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made


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


def test_long_lines_are_thinned_with_their_extremes_kept(tmp_path):
    writer = RunWriter(tmp_path / "long", Manifest(made.layout("full", 1), 0.0, 1, 1))
    values = np.sin(np.arange(9_000) / 50).astype(np.float32)
    values[4_321] = 50
    writer.put(lambda: [("loss", step, value) for step, value in enumerate(values)], 9_000)
    writer.close("finished")
    frame = frames.scalar(open_run(tmp_path / "long"), "long", "loss")
    assert frames.POINTS / 2 <= len(frame) <= frames.POINTS
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


def test_steps_beyond_what_32_bits_hold_keep_their_place(tmp_path):
    told = Manifest(made.layout("full", 1), 0.0, 1, 1)
    writer, steps = RunWriter(tmp_path / "run", told), (0, 1 << 40, 1 << 41)
    values = np.ones(len(told.layout.states), np.float32)
    writer.put(lambda: [("hidden_rms", step, values) for step in steps], steps[-1])
    writer.close("finished")
    grid = frames.over_training(open_run(tmp_path / "run"), "hidden_rms")
    assert grid["step"].unique().tolist() == list(steps) and grid["step"].dtype != np.int64
