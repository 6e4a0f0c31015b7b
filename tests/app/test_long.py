"""Long runs: the same pictures from a digest as from all rows, in bounded memory, and nothing written into a run."""

import os

import numpy as np
import pandas as pd
import pytest

from app import cache, cells, fits, frames, links, notices, reading, reads
from app.snapshot import Followed
from benchmarks import long_run
from probes import compacting, open_run
from probes.digest import FOLDER
from probes.run import Run

STEPS, LAYERS = 3000, 8


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "run"
    long_run.make(path, STEPS, LAYERS, matrices_every=10)
    return path


@pytest.fixture
def lazy(long, tmp_path, monkeypatch):
    """The run read through a digest in a cache, however small it is."""
    monkeypatch.setattr(reading, "SMALL", 0)
    monkeypatch.setattr(compacting, "BYTES", 300_000)
    run = Run(long, cache=tmp_path / "cache")
    assert len(run.attempts[0].digests) > 2 and run.attempts[0].parts
    return run


def test_frames_are_those_of_all_rows(long, lazy):
    whole, last = open_run(long), STEPS - 1
    assert not whole.attempts[0].digests
    pictures = (
        lambda run: frames.profile(run, "a", "hidden_rms", 1234),
        lambda run: pd.DataFrame(frames.profile_frames(run, "hidden_rms", [0, 7, 2500])),
        lambda run: frames.update_ratio(run, "a", last),
        lambda run: cells.cells(run, 1500),
        lambda run: pd.DataFrame(cells.played(run, "depth_weight", [0, 100, 2999])),
        lambda run: reads.over_training(run, "a"),
        lambda run: reads.readership(run, last),
        lambda run: pd.DataFrame(links.strongest(run, last)),
        lambda run: frames.latest({"a": run}, "loss"),
        lambda run: pd.DataFrame(frames.stops([run], ["hidden_rms", "depth_weight"])),
        lambda run: pd.DataFrame(notices.warnings(run) + notices.remarks(run)),
        lambda run: pd.DataFrame(reading.course(run, "depth_weight", [(3, 1)], 200)[1]),
    )
    for picture in pictures:
        pd.testing.assert_frame_equal(picture(lazy), picture(whole))
    assert frames.last_finite(lazy, "hidden_rms", last) == last


def test_a_spike_of_one_step_is_in_every_picture(lazy, monkeypatch):
    spike = long_run.spike_step(STEPS)
    monkeypatch.setattr(frames, "POINTS", 100)
    grid = frames.over_training(lazy, "hidden_rms")
    hit = grid[grid["value"] == long_run.SPIKE]
    assert len(hit) == 1 and hit["step"].item() <= spike < hit["until"].item()
    assert frames.evenness(lazy, "a", "hidden_rms").set_index("step")["ratio"].idxmax() == spike
    layer = min(long_run.SPIKE_LAYER, LAYERS)
    assert frames.of_source(lazy, "a", "hidden_rms", layer)["high"].max() == long_run.SPIKE
    assert spike in fits.over_training(lazy, "a", "hidden_rms")["step"].tolist()


def test_zooming_in_gives_more_points_and_keeps_the_rest(lazy):
    whole = frames.scalar(lazy, "a", "loss", most=100)
    zoomed = frames.scalar(lazy, "a", "loss", most=100, zoom=(1000, 1099))
    inside = zoomed[zoomed["step"].between(1000, 1099)]
    assert inside["step"].tolist() == list(range(1000, 1100))
    assert zoomed["step"].is_monotonic_increasing
    assert (zoomed["step"].iloc[0], zoomed["step"].iloc[-1]) == (
        whole["step"].iloc[0],
        whole["step"].iloc[-1],
    )
    np.testing.assert_array_equal(inside["value"], lazy["loss"][1000:1100].astype(np.float64))


def test_the_dashboard_writes_into_no_run_and_keeps_a_bounded_cache(long, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(path.name for path in (long / "rank-00000").iterdir())
    assert not Followed(long).look().attempts[0].digests, "a small run is read"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(compacting, "BYTES", 300_000)
    run = Followed(long).look()
    assert run.attempts[0].digests and sorted(path.name for path in (long / "rank-00000").iterdir()) == before
    assert FOLDER not in before
    (made,) = cache.root().iterdir()
    monkeypatch.setattr("app.cache.MOST_BYTES", 1000)
    os.utime(made, (1, 1))
    cache.folder(tmp_path / "another")
    assert not made.exists(), "too much, and opened longest ago"
    np.testing.assert_array_equal(run["hidden_rms"], open_run(long)["hidden_rms"])


def test_rows_are_read_as_an_array_would_be_indexed(lazy, long):
    _, rows = reading.series(lazy, "depth_weight")
    whole = open_run(long)["depth_weight"]
    assert rows.shape == whole.shape and isinstance(rows, reading.Rows)
    for key in (5, -1, [3, 0, 3], slice(2, 9, 3), (4, slice(None), 2), (slice(0, 5), 3, 1), np.arange(4)):
        np.testing.assert_array_equal(rows[key], whole[key])
    np.testing.assert_array_equal(np.asarray(rows), whole)
    with pytest.raises(IndexError):
        rows[len(whole)]
