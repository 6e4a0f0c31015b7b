"""Charts for a notebook: valid, titled, with the recorded numbers, of one run or several."""

import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import altair as alt
import pytest

import app
from app import cells, draw
from probes import open_run
from tests.app import made

ROOT = Path(app.__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["loss", "dilution", "gradients", "over_training", "depth_attention"])
def test_every_chart_of_a_run_is_valid(folder, name):
    chart = getattr(app.plot(open_run(folder / "full")), name)()
    assert isinstance(chart, alt.TopLevelMixin)
    assert "full" in chart.to_dict()["title"]["text"]


def test_a_run_draws_itself(folder):
    chart = open_run(folder / "full").plot.dilution(step=100)
    assert "full" in chart.to_dict()["title"]["text"]


def test_reading_a_run_imports_no_chart_library(folder):
    code = (
        "import sys, probes\n"
        f"run = probes.open_run({str(folder / 'full')!r})\n"
        "assert not {'altair', 'pandas', 'app'} & set(sys.modules)\n"
        "run.plot.dilution()\n"
        "assert 'altair' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_somebody_elses_app_is_named(folder, monkeypatch):
    other = ModuleType("app")
    other.__file__ = "/home/me/app.py"
    monkeypatch.setitem(sys.modules, "app", other)
    with pytest.raises(ImportError, match=r"/home/me/app\.py is not depthscope's app"):
        open_run(folder / "full").plot  # noqa: B018


def test_several_runs_share_a_chart(folder):
    runs = [open_run(folder / name) for name in ("prenorm", "full")]
    chart = app.plot(runs).dilution(step=100)
    (data,) = chart.to_dict()["datasets"].values()
    assert {row["run"] for row in data} == {"prenorm", "full"} and {row["step"] for row in data} == {100}
    again = app.plot([runs[0], runs[0]]).dilution()
    assert {row["run"] for row in next(iter(again.to_dict()["datasets"].values()))} == {
        "prenorm 1",
        "prenorm 2",
    }


def test_smoothing_does_not_change_what_the_title_says(folder):
    plots = app.plot(open_run(folder / "full"))
    assert plots.loss(smooth=15).to_dict()["title"] == plots.loss().to_dict()["title"]


def test_what_was_not_recorded_is_named(folder):
    with pytest.raises(KeyError, match="prenorm did not record 'depth_weight'"):
        app.plot(open_run(folder / "prenorm")).depth_attention()


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<svg")])
def test_pictures(folder, kind, magic):
    chart = app.plot(open_run(folder / "full")).depth_attention()
    assert draw.image(chart, kind).startswith(magic)


@pytest.mark.parametrize("name", ["loss", "dilution", "over_training", "depth_attention"])
def test_a_pdf_is_drawn_in_and_small(folder, name):
    pdf = draw.image(getattr(app.plot(open_run(folder / "full")), name)(), "pdf")
    streams = [
        zlib.decompress(part) for part in re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", pdf, re.DOTALL)
    ]
    drawn = b"".join(streams)
    assert pdf.rstrip().endswith(b"%%EOF") and b"/Font" in pdf + drawn
    assert len(re.findall(rb"\s(?:l|c|re)\s", drawn)) > 20  # lines, curves, rectangles
    assert len(pdf) < 200_000


def test_points_that_only_carry_tooltips_are_not_printed(tmp_path):
    made.run(tmp_path / "run", "prenorm", blocks=1, steps=101)
    chart = app.plot(open_run(tmp_path / "run")).loss()
    assert draw.image(chart, "svg").count(b"<path") < 40


def test_numbers_come_back_from_parquet(folder, tmp_path):
    import pandas as pd

    frame = cells.cells(open_run(folder / "full"), 200)
    (tmp_path / "cells.parquet").write_bytes(draw.numbers(frame, "parquet"))
    read = pd.read_parquet(tmp_path / "cells.parquet")
    assert read["depth_weight"].tolist() == frame["depth_weight"].tolist() and list(read) == list(frame)
