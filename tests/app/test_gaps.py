"""Steps that nobody recorded stay empty: no line across them, no heatmap cell over them, and a sentence that says so."""

import numpy as np
import pytest

import probes
from app import frames, gaps
from app.charts.lines import lines
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import opened, plotted, said

LAYOUT = made.layout("prenorm", 1)


def recorded(path, vectors, scalars=(), every=10, matrices=100):
    writer = RunWriter(path, Manifest(LAYOUT, 0.0, every, matrices))
    rows = [("hidden_rms", step, np.full(3, 1 + step, np.float32)) for step in vectors]
    rows += [(name, step, np.float32(step)) for name, steps in scalars for step in steps]
    writer.put(lambda: rows, max(vectors))
    writer.close("finished")
    return open_run(path)


@pytest.fixture
def run(tmp_path):
    """Killed after step 45, resumed at step 95: vectors every 10, the loss at each step, validation every 50."""
    loss = [*range(46), *range(95, 130)]
    scalars = [("loss", loss), ("val_loss", [0, 50, 100]), ("lr", range(130))]
    return recorded(tmp_path / "run", [*range(0, 41, 10), *range(100, 130, 10)], scalars)


def test_a_gap_is_found_between_recorded_steps(run):
    assert gaps.gaps(run) == [gaps.Gap(40, 50, 100)]
    assert gaps.sentence(run) == "Nothing was recorded between steps 40 and 100."


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (10, [0, 10, 20, 25, 30]),
        ([range(5), 10], [0, 1, 2, 3, 4, 10, 20]),
        (probes.log_spaced(2), [0, 1, 3, 10, 32, 100]),
        (7, [0, 7, 10, 14, 20, 21, 28]),
    ],
)
def test_what_the_schedule_asks_for_is_no_gap(tmp_path, every, steps):
    assert gaps.gaps(recorded(tmp_path / "run", steps, every=every)) == []


def test_a_missing_step_of_a_range_is_a_gap(tmp_path):
    run = recorded(tmp_path / "run", [0, 1, 3, 4, 10], every=[range(5), 10])
    assert gaps.gaps(run) == [gaps.Gap(1, 2, 3)]


def test_segments_break_where_a_series_has_nothing(run):
    loss = gaps.segments(run, run.steps("loss"))
    assert run.steps("loss")[np.argmax(loss)] == 95 and set(loss) == {0, 1}
    assert not gaps.segments(run, run.steps("lr")).any()  # logged all the while
    assert not gaps.segments(run, run.steps("val_loss")).any()  # its own cadence


def test_no_line_joins_the_two_sides_of_a_gap(run):
    frame = frames.scalar(run, "run", "loss", window=10)
    first = frame[frame["segment"] == 1].iloc[0]
    assert first["step"] == 95 and first["value"] == first["low"] == 95  # the mean begins anew
    chart = lines(frame, "value", "Loss", {"run": "#000"}, "t").to_dict()
    told = {"field": "segment", "type": "nominal"}
    assert [layer["encoding"]["detail"] for layer in chart["layer"]] == [told] * len(chart["layer"])


def test_bins_do_not_reach_across_a_gap(run):
    frame = frames.scalar(run, "run", "loss", most=3)
    assert (frame["low"] <= frame["high"]).all()
    assert not ((frame["low"] < 46) & (frame["high"] > 46)).any()


def test_a_heatmap_leaves_a_gap_empty(run):
    grid = frames.over_training(run, "hidden_rms")
    assert sorted(set(zip(grid["step"], grid["until"], strict=True)))[4:6] == [(40, 50), (100, 110)]


def test_a_point_between_two_gaps_is_seen(tmp_path):
    run = recorded(tmp_path / "run", [0, 10, 20, 60, 100, 110], [("loss", [0, 10, 20, 60, 100, 110])])
    frame = frames.scalar(run, "run", "loss")
    chart = lines(frame, "value", "Loss", {"run": "#000"}, "t").to_dict()
    (rows,) = chart["datasets"].values()
    assert [row["step"] for row in rows if row["alone"]] == [60]


def test_the_page_names_the_gap(run):
    at = opened(run.path.parent)
    assert "Nothing was recorded between steps 40 and 100." in said(at)
    _, (frame,) = plotted(at)[0]
    assert frame["segment"].nunique() == 2


@pytest.mark.parametrize("page", ["runs", "dilution", "gradients", "depth_attention"])
def test_every_curve_knows_its_gaps(tmp_path, page):
    told = made.manifest("full", 4)
    writer = RunWriter(tmp_path / "run", told)
    for step in (0, 10, 20, 90, 100):
        rows = list(made.rows("full", told.layout, step))
        writer.put(lambda rows=rows: rows, step)
    writer.close("finished")
    curves = [
        frame
        for spec, (frame, *_) in plotted(opened(tmp_path, f"pages_/{page}.py"))
        if any(layer.get("mark", {}).get("type") == "line" for layer in spec.get("layer", []))
        and "step" in frame
        if frame["step"].nunique() > 1
    ]
    assert curves and all(frame["segment"].nunique() == 2 for frame in curves)
