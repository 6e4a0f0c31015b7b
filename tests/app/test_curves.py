"""Curves along step, tokens or time, smoothed without losing a spike; runs found by a regular expression."""

import numpy as np
import pytest

from app import frames, pick, words
from app.charts.lines import lines
from app.opener import Entry
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import opened, plotted


@pytest.fixture
def run(tmp_path):
    writer = RunWriter(tmp_path / "run", Manifest(made.layout("prenorm", 1), 0.0, 1, 1))
    rows = []
    for step in range(30):
        rows.append(("loss", step, np.float32(9 if step == 20 else 1)))
        if step % 2 == 0:
            rows.append(("tokens", step, np.float32(1000 * step)))
    writer.put(lambda: rows, 30)
    writer.close("finished")
    return open_run(tmp_path / "run")


def test_tokens_between_two_logged_ones_are_interpolated(run):
    frame = frames.scalar(run, "run", "loss", "tokens")
    assert frame["x"].tolist()[:4] == [0, 1000, 2000, 3000]
    assert frames.scalar(run, "run", "loss", "wall_time").empty


def test_a_smoothed_spike_stays_in_the_band(run):
    frame = frames.scalar(run, "run", "loss", window=10)
    assert frame["value"].max() == pytest.approx(1.8)
    assert frame["high"].max() == 9 and frame.loc[20, "value"] == pytest.approx(1.8)
    chart = lines(frame, "value", "loss", {"run": "#000"}, "t").to_dict()
    assert len(chart["layer"]) == 3


def test_automatic_smoothing_leaves_few_points_alone(run, tmp_path):
    assert frames.smoothing([run], "loss") == 0
    writer = RunWriter(tmp_path / "long", Manifest(made.layout("prenorm", 1), 0.0, 1, 1))
    rows = [("loss", step, np.float32(step % 2)) for step in range(200)]
    writer.put(lambda: rows, 200)
    writer.close("finished")
    long = open_run(tmp_path / "long")
    window = frames.smoothing([run, long], "loss")  # the same for both, so that they can be compared
    frame = frames.scalar(long, "run", "loss", window=window)
    assert window == 4
    assert frame["value"].iloc[-1] == 0.5 and frame["low"].iloc[-1] == 0 and frame["high"].iloc[-1] == 1


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_logarithmic_axes_leave_zeros_out(run, x):
    frame = frames.scalar(run, "run", "loss", x)
    chart = lines(frame, "value", "loss", {"run": "#000"}, "t", "log", x=x, x_scale="log").to_dict()
    scale = chart["layer"][0]["encoding"]["x"]["scale"]
    assert scale["type"] == "log" and scale["domain"][0] > 0


def test_the_page_draws_what_the_link_says(folder):
    at = opened(folder, runs=["full"], along="step", smooth="10", curve_scale="xy")
    assert not at.exception
    spec, (frame, *_) = plotted(at)[0]
    assert spec["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"
    assert frame["step"].min() == 10


def test_runs_are_found_by_a_regular_expression(folder):
    made_up = (("full", ()), ("b", ("Sweep 2",)), ("Full-2", ()))
    entries = [Entry(name, folder, tags=tags) for name, tags in made_up]
    assert pick.matching(entries, "^full") == (["full", "Full-2"], "")
    assert pick.matching(entries, "sweep") == (["b"], "")
    assert pick.matching(entries[:1], "(")[0] == ["full"]
    assert not opened(folder).text_input  # three runs are found without a search
    at = opened(folder, runs=["full"], search="^b")
    assert at.multiselect(key="pick runs").options == ["full", "block"]
    assert at.dataframe[0].value["Run"].tolist() == ["block"]
    at.text_input(key="pick search").set_value("(").run()
    assert not at.exception and at.session_state["view"].search == "("
    assert not opened(folder, search="nothing is called this").exception


@pytest.mark.parametrize(
    ("seconds", "told"), [(-3, "0 s"), (40, "40 s"), (720, "12 min"), (3 * 3600, "3 h"), (5e5, "6 days")]
)
def test_ages(seconds, told):
    assert words.age(seconds) == told
