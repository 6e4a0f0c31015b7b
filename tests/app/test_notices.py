"""A run whose own numbers speak against it says so in one sentence, on every page."""

import numpy as np
import pytest

from app import notices
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import PAGES, opened, said

LAYOUT = made.layout("prenorm", 2)


def recorded(path, *rows, dtype="float32"):
    writer = RunWriter(path, Manifest(LAYOUT, 0.0, 10, 10, versions={"dtype": dtype}))
    rows = [(name, step, np.asarray(value, np.float32)) for name, step, value in rows]
    writer.put(lambda: rows, 100)
    writer.close("finished")
    return open_run(path)


def test_the_first_state_that_is_not_finite_is_named(tmp_path):
    run = recorded(
        tmp_path / "run",
        ("nonfinite", 0, [0, 0, 0, 0, 0]),
        ("nonfinite", 10, [0, 0, 12, 12, 12]),
        ("nonfinite", 20, [7, 7, 7, 7, 7]),
    )
    assert notices.warnings(run) == [
        "The state into layer 3 (attention of transformer block 2) held 12 values that are not finite at step 10, the "
        "first seen in this run; at step 0 all were finite."
    ]


def test_a_layer_that_is_not_finite_between_counted_steps_is_named(tmp_path):
    nan, ones = np.nan, [1] * 5
    run = recorded(
        tmp_path / "run",
        *(
            (name, 0, value)
            for name, value in (("nonfinite", [0] * 5), ("hidden_rms", ones), ("output_rms", ones))
        ),
        *((name, 3, ones) for name in ("hidden_rms", "output_rms")),
        ("hidden_rms", 6, [1, 1, np.inf, nan, nan]),
        ("output_rms", 6, [1, 1, nan, nan, nan]),
        ("nonfinite", 10, [9] * 5),
    )
    assert notices.warnings(run) == [
        "The output of layer 2 (MLP of transformer block 1) held values that are not finite at step 6, the first seen "
        "in this run; at step 3 all were finite."
    ]
    never_seen = recorded(tmp_path / "other", ("hidden_rms", 0, [1, nan, 1, 1, 1]), ("output_rms", 0, ones))
    assert notices.warnings(never_seen) == []


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    nan = np.nan
    run = recorded(tmp_path / "a", *(("loss", step, value) for step, value in enumerate([3, 2, nan, nan])))
    assert notices.warnings(run) == ["The training loss is not finite from step 2 on."]
    run = recorded(
        tmp_path / "b", *(("loss", step, value) for step, value in enumerate([3, np.inf, 2, nan, 2]))
    )
    assert notices.warnings(run) == ["The training loss is not finite at step 1 and once later."]


@pytest.mark.parametrize(("dtype", "error", "told"), [("float32", 0.02, True), ("bfloat16", 0.02, False)])
def test_a_stream_that_does_not_add_up_is_told(tmp_path, dtype, error, told):
    run = recorded(tmp_path / "run", ("identity_error", 0, [0, 0, 0, error, error]), dtype=dtype)
    sentences = notices.warnings(run)
    assert bool(sentences) == told
    if told:
        assert "The state into layer 4 (MLP) is not the embedding plus the outputs before it" in sentences[0]
        assert "off by 2% of its size at step 0" in sentences[0]


def test_a_stream_that_is_rescaled_is_remarked(tmp_path):
    """DeepNorm and the like: the outputs explain every state, with other weights than one."""
    off = ("identity_error", 0, [0, 1, 1, 1, 1])
    run = recorded(tmp_path / "rescaled", off, ("mixing_r2", 0, [1, 0.98, np.nan, 1, 1]))
    assert notices.warnings(run) == []
    assert notices.remarks(run)[0].startswith("This residual rescales its stream")
    run = recorded(tmp_path / "otherwise", off, ("mixing_r2", 0, [1, 0.5, 1, 1, 1]))
    assert "is not the embedding plus" in notices.warnings(run)[0] and notices.remarks(run) == []


def test_a_model_that_reads_its_sources_is_meant_not_to_add_up(tmp_path):
    weight = LAYOUT.pack(np.tril(np.ones((5, 5))))
    run = recorded(tmp_path / "run", ("identity_error", 0, [0, 1, 1, 1, 1]), ("depth_weight", 0, weight))
    assert notices.warnings(run) == []


def test_skipped_attempts_are_counted(tmp_path):
    run = recorded(tmp_path / "run", ("skipped", 0, 2), ("skipped", 10, 0), ("skipped", 20, 1))
    assert notices.remarks(run) == [
        "The loss scaler skipped 3 attempts, the last at step 20, because gradients were not finite."
    ]


def test_a_healthy_run_says_nothing(folder):
    assert [notices.warnings(open_run(folder / name)) for name in ("prenorm", "full")] == [[], []]
    assert notices.remarks(open_run(folder / "full")) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_page_says_it(tmp_path, page):
    recorded(tmp_path / "run", ("nonfinite", 0, [0, 0, 0, 1, 0]), ("hidden_rms", 0, [1, 1, 1, 1, 1]))
    assert "held 1 value that is not finite at step 0" in said(opened(tmp_path, f"pages_/{page}.py"))
