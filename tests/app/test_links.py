"""Links name the reads that lean on one source, and how they came to."""

import numpy as np
import pytest

from app.links import strongest, trend_of
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made


def recorded(path, weights: dict[int, np.ndarray], contributions=None):
    shape = made.layout("full", 2)
    writer = RunWriter(path, Manifest(shape, 0.0, 10, 10))
    rows = [("depth_weight", step, shape.pack(value)) for step, value in weights.items()]
    rows += [("contribution_rms", step, shape.pack(value)) for step, value in (contributions or {}).items()]
    writer.put(lambda: rows, max(weights))
    writer.close("finished")
    return open_run(path)


@pytest.fixture
def weights():
    """Layer 4 learns to read layer 1, from 0.25 to 0.61; every other read stays an even average."""
    even = np.tril(np.ones((5, 5)))
    even /= even.sum(axis=1, keepdims=True)
    found = {}
    for step, share in (
        (0, 0.25),
        (100, 0.25),
        (200, 0.25),
        (300, 0.25),
        (400, 0.4),
        (500, 0.61),
        (600, 0.61),
    ):
        rest = (1 - share) / 3
        found[step] = even.copy()
        found[step][3] = [rest, share, rest, rest, 0]
    return found


def test_the_strongest_link_as_a_sentence(tmp_path, weights):
    run = recorded(tmp_path / "run", weights)
    links = strongest(run, 600)
    assert [link.sentence() for link in links] == [
        "Layer 4 (MLP) reads layer 1 (attention) with 0.61, rising since step 300"
    ]
    assert links[0].excess == pytest.approx(0.36, abs=1e-6)


def test_an_effect_is_strong_on_either_side_of_zero(tmp_path):
    shape = made.layout("full", 2)
    writer = RunWriter(tmp_path / "run", Manifest(shape, 0.0, 10, 10))
    effects = np.zeros((5, 5))
    effects[4] = [0.003, -0.05, 0.002, 0.045, 0.0]
    effects[2] = [0.02, -0.02, 0.0, 0, 0]
    writer.put(lambda: [("depth_attribution", 0, shape.pack(effects))], 0)
    writer.close("finished")
    links = strongest(open_run(tmp_path / "run"), 0, "depth_attribution")
    assert [(link.row, link.column) for link in links] == [(5, 1), (5, 3), (3, 0), (3, 1)]
    assert links[0].sentence("depth_attribution") == (
        "Without layer 1 (attention) in the final read the loss changes by -0.05"
    )


def test_rounding_is_no_preference(tmp_path):
    """Zero queries give an even average, up to the last bits of float32."""
    even = np.tril(np.ones((5, 5), np.float32))
    even /= even.sum(axis=1, keepdims=True)
    even[4] *= np.array([1, 1 + 1e-6, 1 - 1e-6, 1, 1], np.float32)
    run = recorded(tmp_path / "run", {0: even})
    assert strongest(run, 0) == []


def test_only_the_past_counts(tmp_path, weights):
    run = recorded(tmp_path / "run", weights)
    assert strongest(run, 300) == []
    assert strongest(run, 450)[0].sentence().endswith("with 0.40, rising since step 300")


def test_the_newest_source_is_left_out(tmp_path):
    weight = np.eye(5)
    run = recorded(tmp_path / "run", {0: weight})
    assert strongest(run, 0) == []


def test_the_final_read_and_the_embedding_are_named(tmp_path):
    weight = np.eye(5)
    weight[4] = [0.7, 0.1, 0.1, 0.05, 0.05]
    run = recorded(tmp_path / "run", {0: weight})
    assert [link.sentence() for link in strongest(run, 0)] == ["The final read reads the embedding with 0.70"]


def test_kinds_are_separable(tmp_path, weights):
    run = recorded(tmp_path / "run", weights)
    assert strongest(run, 600, kind="attention") == []
    assert len(strongest(run, 600, kind="mlp")) == 1


def test_contributions_are_told_in_their_own_unit(tmp_path, weights):
    run = recorded(tmp_path / "run", weights, {600: 3 * weights[600]})
    link = strongest(run, 600, "contribution_rms")[0]
    assert link.sentence("contribution_rms") == "Layer 4 (MLP) gets 1.83 RMS from layer 1 (attention)"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.5], ("", 0)),
        ([0.5, 0.5, 0.51], ("steady", 0)),
        ([0.1, 0.3, 0.5, 0.5, 0.5, 0.5], ("steady", 20)),
        ([0.1, 0.2, 0.3, 0.4], ("rising", 0)),
        ([0.4, 0.1, 0.2, 0.3], ("rising", 10)),
        ([0.1, 0.5, 0.4, 0.3], ("falling", 10)),
        ([np.nan, 0.1, 0.3], ("rising", 10)),
    ],
)
def test_trends(values, told):
    assert trend_of(np.arange(len(values)) * 10, np.array(values)) == told
