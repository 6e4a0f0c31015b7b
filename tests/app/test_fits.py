"""The growth exponent is that of a made power law; Gini and update ratios are those of hand-made numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import experts, fits, frames
from app.charts.growth import growth
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import mounted, opened, said


@given(st.floats(-2, 2), st.floats(0.01, 100), st.integers(3, 60))
def test_a_power_law_gives_its_exponent(exponent, factor, layers):
    slope, intercept, r2 = fits.slopes(factor * np.arange(1, layers + 1)[None, :] ** exponent)
    assert slope[0] == pytest.approx(exponent, abs=1e-6)
    assert np.exp(intercept[0]) == pytest.approx(factor, rel=1e-5)
    assert np.isnan(r2[0]) or r2[0] == pytest.approx(1, abs=1e-4)


def test_blanks_are_left_out_and_two_points_are_no_fit():
    values = np.array([[1, np.nan, 3, 4, 0.0], [1, 2, np.nan, np.nan, np.nan]])
    slope, _, _ = fits.slopes(values)
    assert slope[0] == pytest.approx(1) and np.isnan(slope[1])


def test_the_fit_is_drawn_and_told():
    frame = pd.DataFrame({"run": "a", "step": 5, "depth": [1, 2, 4], "place": "p", "value": [1.0, 2.0, 4.0]})
    lines = fits.fitted(frame.assign(depth=[1, 2, 3], value=[1.0, 2.0, 3.0]))
    assert lines["value"].tolist() == pytest.approx([1, 3])
    assert fits.finding(lines, "hidden_rms") == "Hidden-state RMS goes like depth^1.00 in a (R² 1.00)"
    bad = lines.assign(run="b", r2=0.08)
    assert fits.finding(bad, "hidden_rms") == "Hidden-state RMS: no power of depth fits b (R² 0.08)"
    both = fits.finding(pd.concat([lines, bad]), "hidden_rms")
    assert both.endswith("depth^1.00 in a (R² 1.00); no power of depth fits b (R² 0.08)")
    growth(frame, lines, "hidden_rms", {"a": "#0072B2"}, "t").to_dict()
    assert fits.finding(lines.iloc[:0], "hidden_rms").endswith("too few layers for a fit")


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20))
def test_gini_against_its_definition(values):
    values = np.array(values)
    mean_gap = np.abs(values[:, None] - values[None, :]).mean()
    assert frames.gini(values[None, :])[0] == pytest.approx(mean_gap / (2 * values.mean()), abs=1e-9)


def test_update_ratios(tmp_path):
    shape = made.layout("prenorm", 1)
    writer = RunWriter(tmp_path / "run", Manifest(shape, 0.0, 1, 1))
    rows = [
        ("param_grad_norm", 0, np.float32([2, 4])),
        ("param_norm", 0, np.float32([10, 5])),
        ("lr", 0, np.float32(0.1)),
    ]
    writer.put(lambda: rows, 0)
    writer.close("finished")
    run = open_run(tmp_path / "run")
    assert frames.update_ratio(run, "run", 3)["value"].tolist() == pytest.approx([0.02, 0.08])
    at = opened(tmp_path, "pages_/gradients.py", gradient="param_grad_norm")
    assert not at.exception and "An estimate: gradient norm" in said(at)
    assert any(
        "update ratio (estimate) is 4.0×" in data["alt"].lower() for data in mounted(at, "depthscope_chart")
    )


def test_a_recorded_update_ratio_goes_before_a_derived_one(tmp_path):
    writer = RunWriter(tmp_path / "run", Manifest(made.layout("prenorm", 1), 0.0, 1, 1))
    norms = [(name, 0, np.float32([2, 4])) for name in ("param_grad_norm", "param_norm")]
    rows = [*norms, ("lr", 0, np.float32(0.1)), ("update_ratio", 0, np.float32([0.25, 0.5]))]
    writer.put(lambda: rows, 0)
    writer.close("finished")
    assert frames.update_ratio(open_run(tmp_path / "run"), "run", 0)["value"].tolist() == [0.25, 0.5]
    at = opened(tmp_path, "pages_/gradients.py", gradient="param_grad_norm")
    assert (
        not at.exception
        and "a fixed sample of its elements" in said(at)
        and "gradient norm ×" not in said(at)
    )


def test_experts_are_shown_where_they_were_recorded(tmp_path):
    writer = RunWriter(tmp_path / "run", Manifest(replace(made.layout("prenorm", 2), experts=3), 0.0, 1, 1))
    blank = [np.nan] * 3
    load = np.float32([blank, [0.5, 0.5, np.nan], blank, [0.7, 0.3, 0.0]])
    balance = np.float32([np.nan, 1, np.nan, 0.56])
    rows = [("expert_load", 0, load), ("expert_balance", 0, balance), ("param_grad_norm", 0, np.ones(4))]
    writer.put(lambda: rows, 0)
    writer.close("finished")
    frame = experts.cells(open_run(tmp_path / "run"), 5)
    assert frame["value"].tolist() == pytest.approx([0.5, 0.5, 0.7, 0.3, 0])
    assert frame["even"].tolist() == pytest.approx([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])
    at = opened(tmp_path, "pages_/gradients.py", gradient="param_grad_norm")
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
    told = (
        "run: expert 1 of layer 4 (MLP) gets most, 2.1× an even share, at step 0; 1 of 5 experts get nothing"
    )
    assert not at.exception and told in titles
    assert "Least even: a balance of 0.560 in layer 4 (MLP) of run" in titles


def test_the_page_shows_exponents(folder):
    at = opened(folder, "pages_/dilution.py", runs=["prenorm", "full"])
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
    assert any(title.startswith("Hidden-state RMS goes like depth^") for title in titles)
    assert any(title.startswith("Growth exponent at the last step: ") for title in titles)
