"""Charts carry the numbers of their frame and a title that states what they show; Vega-Lite accepts them."""

import io

import altair as alt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from app import cells, draw, findings, frames
from app.charts import axes, palette
from app.charts.lines import lines
from app.charts.profile import profile
from app.charts.training import over_training
from app.charts.triangle import triangle
from probes import open_run
from probes.vocabulary import metric

COLOURS = {"prenorm": palette.RUNS[0], "full": palette.RUNS[1]}


@pytest.fixture
def depth() -> pd.DataFrame:
    parts = []
    for run, values in (("prenorm", [1, 3, 9, 14]), ("full", [1, 1, 2, 2])):
        places = [f"place {i}" for i in range(1, 5)]
        parts.append(
            pd.DataFrame({"run": run, "step": 200, "depth": range(1, 5), "place": places, "value": values})
        )
    return pd.concat(parts, ignore_index=True)


def test_growth_states_the_factor(depth):
    one = depth[depth["run"] == "prenorm"]
    told = "prenorm’s hidden-state RMS grows 14× from layer 1 to the final state at step 200"
    assert findings.growth(one, "hidden_rms") == told
    both = "Hidden-state RMS from layer 1 to the final state at step 200: 14× in prenorm and 2.0× in full"
    assert findings.growth(depth, "hidden_rms") == both


def test_growth_is_counted_behind_the_first_transformer_block():
    """The leap from the tiny embedding is every architecture's; it would make all of them seem to grow."""
    values = [0.04, 0.05, 2.0, 2.5, 3.0, 4.0]
    frame = pd.DataFrame({"run": "a", "step": 7, "depth": range(1, 7), "value": values})
    told = "a’s hidden-state RMS grows 2.0× from layer 3 to the final state at step 7"
    assert findings.growth(frame, "hidden_rms") == told
    assert findings.growth(frame, "output_rms").endswith(
        "grows 2.0× from layer 3 to the last layer at step 7"
    )
    assert "grows 100× from the first to the last transformer block" in findings.growth(frame, "block_rms")


def test_what_is_not_finite_is_said():
    frame = pd.DataFrame({"run": "a", "step": 5, "depth": [0, 1, 2], "value": [np.nan] * 3})
    assert findings.unevenness(frame, "output_grad_rms") == "a: no finite output gradient RMS at step 5"
    frame = pd.DataFrame({"run": "a", "step": [3, 4], "cv": [0.5, np.nan]})
    assert findings.evenness(frame, "cv") == "CV over depth at step 3: 0.500 in a"


def test_unevenness_leaves_the_embedding_out():
    frame = pd.DataFrame({"run": "a", "step": 5, "depth": [0, 1, 2], "value": [100.0, 2.0, 8.0]})
    told = "a’s largest output gradient RMS is 4.0× its smallest at step 5"
    assert findings.unevenness(frame, "output_grad_rms") == told


def test_losses_are_compared_where_all_runs_are():
    frame = pd.DataFrame(
        {"run": ["a"] * 3 + ["b"] * 2, "step": [0, 10, 20, 0, 10], "value": [5.0, 4.0, 1.0, 5.0, 3.0]}
    )
    told = "Training loss at step 10: 4.00 in b and 4.50 in a"
    assert findings.losses(frame, "loss") == f"{told} (mean of 2 recorded losses)"
    assert findings.losses(frame, "val_loss") == "Validation loss at step 10: 3.00 in b and 4.00 in a"


def test_profile_draws_its_frame(depth):
    chart = profile(depth, "hidden_rms", COLOURS, "A title")
    spec = chart.to_dict()
    assert spec["title"]["text"] == "A title"
    (data,) = spec["datasets"].values()
    assert [row["value"] for row in data] == [1, 3, 9, 14, 1, 1, 2, 2]
    colour = spec["layer"][0]["encoding"]["color"]["scale"]
    assert dict(zip(colour["domain"], colour["range"], strict=True)) == COLOURS
    assert spec["layer"][0]["encoding"]["y"]["axis"]["title"] == axes.measure("hidden_rms")
    assert metric("hidden_rms").title in axes.measure("hidden_rms")


def test_a_logarithmic_scale_leaves_zeros_out(depth):
    depth.loc[0, "value"] = 0
    (data,) = profile(depth, "hidden_rms", COLOURS, "", "log").to_dict()["datasets"].values()
    assert len(data) == len(depth) - 1


def test_triangle_leaves_missing_cells_blank(folder):
    frame = cells.cells(open_run(folder / "full"), 200)
    spec = triangle(frame, "depth_weight", "t", (0, 1)).to_dict()
    data = spec["datasets"][spec["layer"][0]["data"]["name"]]
    assert len(data) == 13 * 14 // 2
    encoding = spec["layer"][0]["encoding"]
    labels = encoding["y"]["axis"]["labelExpr"], encoding["x"]["axis"]["labelExpr"]
    assert "'final'" in labels[0] and "'emb.'" in labels[1]
    shown = {row["read"] + row["from"]: row["depth_weight"] for row in data}
    run = open_run(folder / "full")
    assert shown["final readembedding"] == pytest.approx(float(run["depth_weight"][-1, -1, 0]))


@pytest.mark.parametrize(
    "name", ["hidden_rms", "output_rms", "block_rms", "param_grad_norm", "output_grad_rms"]
)
def test_every_heatmap_is_valid(folder, name):
    grid = frames.over_training(open_run(folder / "block"), name)
    over_training(grid, name, "t", (0.1, 10)).to_dict()


def test_bands_appear_with_averaged_points_only():
    frame = pd.DataFrame({"run": "a", "step": [0, 1], "low": [1, 1], "value": [2, 2], "high": [2, 3]})
    assert len(lines(frame, "value", "y", {"a": "#000"}, "t").to_dict()["layer"]) == 3
    assert len(lines(frame.drop(columns="low"), "value", "y", {"a": "#000"}, "t").layer) == 2


@pytest.mark.parametrize("count", range(1, 240, 7))
def test_ticks_are_few_and_name_the_ends(count):
    ticks = axes.ticks(1, count, keep=[count])
    assert ticks[-1] == count and len(ticks) <= 16 and ticks == sorted(set(ticks))


def test_decades_stay_inside_the_scale():
    for low, high in ((1e-9, 1.0), (0.02, 0.03), (0.9, 14.0), (1, 1e6)):
        assert all(low <= value <= high for value in axes.decades(low, high))


def test_colours_stay_with_a_run():
    everyone = [f"run {i}" for i in range(9)]
    first = palette.assign(everyone, everyone[:3])
    assert palette.assign(everyone, [everyone[2]])[everyone[2]] == first[everyone[2]]
    assert len(set(palette.assign(everyone, ["run 0", "run 7", "run 8"]).values())) == 3


def test_saved_pictures_hold_title_and_numbers(depth):
    chart = profile(depth, "hidden_rms", COLOURS, "A stated title")
    svg = draw.image(chart, "svg").decode()
    assert "A stated title" in svg and "<svg" in svg
    picture = Image.open(io.BytesIO(draw.image(chart, "png"))).convert("L")
    title = np.asarray(picture)[:70]
    assert (title < 90).sum() > 200, "the title is not drawn: is its font there?"


def test_empty_frames_draw_nothing_and_break_nothing():
    empty = pd.DataFrame({"run": [], "step": [], "depth": [], "place": [], "value": np.array([], float)})
    assert isinstance(profile(empty, "hidden_rms", {}, "t"), alt.LayerChart)
    assert findings.growth(empty, "hidden_rms").endswith("nothing recorded yet")
