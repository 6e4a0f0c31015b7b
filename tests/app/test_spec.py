"""A chart taken apart: numbers travel, the specification of a growing run stays."""

import json

import pandas as pd
import pytest

from app import cells, frames, vega
from app.browser import arrow, spec
from app.charts.lines import lines
from app.charts.profile import profile
from app.charts.training import over_training
from app.charts.triangle import triangle
from probes import open_run
from tests.app import made

COLOURS = {"a": "#0072B2"}


def drawn(path, name: str):
    """One chart of a run, of each kind."""
    run = open_run(path)
    last = run.last_step
    if name == "lines":
        return lines(frames.scalar(run, "a", "loss"), "value", "loss", COLOURS, "t")
    if name == "profile":
        return profile(frames.profile(run, "a", "hidden_rms", last), "hidden_rms", COLOURS, "t")
    if name == "logarithmic":
        return profile(frames.profile(run, "a", "hidden_rms", last), "hidden_rms", COLOURS, "t", "log")
    if name == "heatmap":
        return over_training(frames.over_training(run, "hidden_rms"), "hidden_rms", "t", (0.1, 3.0 + last))
    return triangle(cells.cells(run, last), "depth_weight", "t", (0, 0.5 + last / 1e4))


@pytest.mark.parametrize("name", ["lines", "profile", "logarithmic", "heatmap", "triangle"])
def test_a_growing_run_keeps_its_specification(tmp_path, name):
    early, late = (
        spec.separate(drawn(made.run(tmp_path / str(n), "full", steps=n).parent / str(n), name))
        for n in (41, 43)
    )
    assert early[0] == late[0]
    assert set(early[1]) == set(late[1]) and set(early[2]) == set(late[2])


def test_domains_and_tables_travel_apart(folder):
    chart = triangle(cells.cells(open_run(folder / "full"), 200), "depth_weight", "t", (0, 0.7))
    told, signals, tables = spec.separate(chart)
    colour = json.loads(told)["layer"][0]["encoding"]["color"]["scale"]
    assert [signals[end["expr"]] for end in colour["domain"]] == [0, 0.7]
    assert len(tables["rows0"]) == 13 * 14 // 2 and "datasets" not in json.loads(told)


def test_tables_reach_the_browser_as_numbers():
    table = arrow(pd.DataFrame({"step": [1, 2], "run": ["a", "b"]}, index=[7, 8]))
    assert [str(kind) for kind in table.schema.types] == ["double", "large_string"]
    assert table.column_names == ["step", "run"]


def test_the_library_is_bundled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vega.library.cache_clear()
    first = vega.library()
    (kept,) = (tmp_path / "depthscope").iterdir()
    assert kept.read_text() == first and "window.depthscopeVega" in first
    vega.library.cache_clear()
    monkeypatch.setattr("vl_convert.javascript_bundle", None)
    assert vega.library() == first
    vega.library.cache_clear()
