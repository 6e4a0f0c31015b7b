"""What reads do as a whole, and what a click on one shows."""

import numpy as np
import pytest

from app import reads
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import mounted, opened, plotted, said


def recorded(path, weight: np.ndarray, entropy=None):
    shape = made.layout("full", 2)
    writer = RunWriter(path, Manifest(shape, 0.0, 10, 10))
    rows = [("depth_weight", 0, shape.pack(weight))]
    if entropy is not None:
        rows.append(("depth_entropy", 0, np.asarray(entropy, np.float32)))
    writer.put(lambda: rows, 0)
    writer.close("finished")
    return open_run(path)


def test_locality_is_a_mean_over_reads_of_three_sources_or_more(tmp_path):
    weight = np.eye(5)
    weight[4] = [0.5, 0, 0, 0, 0.5]
    run = recorded(tmp_path / "run", weight, [np.nan, 0, 0.1, 0.2, 0.6])
    row = reads.over_training(run, "run").iloc[0]
    assert row["newest"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert row["embedding"] == pytest.approx(0.5 / 3)
    assert row["distance"] == pytest.approx((0 + 0 + 2) / 3)
    assert row["entropy"] == pytest.approx(0.3)
    attention = reads.over_training(run, "run", "attention").iloc[0]
    assert attention["newest"] == pytest.approx(0.75)  # layer 3 and the final read


def test_sinks_and_ballast_are_named(tmp_path):
    weight = np.zeros((5, 5))
    for row in range(5):
        weight[row, 0], weight[row, row] = 0.7, 0.3
    weight[0, 0] = 1
    told = reads.roles(recorded(tmp_path / "run", weight), 0)
    assert told.sinks == ["embedding"] and told.ballast == ["layer 1 (attention)"]
    assert told.sentence().startswith("Sinks, which most reads lean on: embedding.")


def test_an_even_average_has_neither(tmp_path):
    weight = np.tril(np.ones((5, 5)))
    told = reads.roles(recorded(tmp_path / "run", weight / weight.sum(axis=1, keepdims=True)), 0)
    assert told.sinks == told.ballast == []


def test_a_read_in_focus_is_shown_as_bars_over_training_and_with_the_other_readers(folder):
    at = opened(
        folder, "pages_/depth_attention.py", runs=["full"], focus="full", read="8", source="2", step="100"
    )
    assert not at.exception and "Layer 8 (MLP) of full" in said(at)
    charts = plotted(at)
    assert len(charts) == 10  # the triangle, three of the read, the readers, four over training, the entropy
    run = open_run(folder / "full")
    weight = run["depth_weight"][run.steps("depth_weight").tolist().index(100)]
    bars = next(rows[0] for spec, rows in charts if "chosen" in rows[0] and len(rows[0]) == 8)
    assert bars["value"].to_numpy() == pytest.approx(weight[7, :8])
    assert bars.loc[bars["chosen"], "place"].tolist() == ["layer 2 (MLP)"]
    readers = next(rows[0] for spec, rows in charts if "chosen" in rows[0] and len(rows[0]) == 11)
    assert readers["value"].to_numpy() == pytest.approx(weight[2:, 2])
    outline = charts[0][1][1]
    assert outline.to_numpy().tolist() == [[-0.5, 7.5, 6.5, 7.5], [1.5, 2.5, 1.5, 12.5]]


def test_a_strong_link_puts_its_read_in_focus(folder):
    at = opened(folder, "pages_/depth_attention.py", runs=["full"])
    button = next(button for button in at.button if (button.key or "").startswith("link full"))
    button.click().run()
    view = at.session_state["view"]
    assert view.focus == "full" and f"link full {view.read} {view.source}" == button.key
    next(button for button in at.button if button.label == "Let go of this read").click().run()
    assert at.session_state["view"].focus == "" and not at.exception


def test_attention_and_mlp_reads_have_panels_of_their_own(folder):
    at = opened(folder, "pages_/depth_attention.py", reads="apart")
    assert not at.exception
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")[:4]]
    assert [title.split(" at ")[0] for title in titles] == [
        "full, attention reads",
        "full, MLP reads",
        "block, attention reads",
        "block, MLP reads",
    ]


@pytest.mark.parametrize(
    "params", [{"read": "99"}, {"read": "3", "source": "50"}, {"read": "0"}, {"focus": "gone"}]
)
def test_a_link_to_a_read_that_is_not_there_opens_the_page(folder, params):
    at = opened(folder, "pages_/depth_attention.py", runs=["full"], **{"focus": "full", **params})
    assert not at.exception


def test_playback_frames_hold_the_recorded_weights(folder):
    at = opened(folder, "pages_/depth_attention.py", runs=["full"])
    data = mounted(at, "depthscope_chart")[0]
    run = open_run(folder / "full")
    assert data["frames"]["steps"] == run.steps("depth_weight").tolist()
    frames = data[data["frames"]["fields"]["depth_weight"]]
    assert frames["s3"].to_numpy() == pytest.approx(run.layout.pack(run["depth_weight"][3]))
