"""Mirrors: the scalars of a run, seen elsewhere too, and the run as it is without."""

import importlib
import sys

import numpy as np
import pytest

import probes
from tests.probes.models import recorded


def test_a_function_is_given_every_step(tmp_path):
    seen = {}
    run = recorded(tmp_path / "run", mirror=lambda step, values: seen.setdefault(step, {}).update(values))
    assert sorted(seen) == [0, 1, 2]
    for row, step in enumerate(run.steps("hidden_rms")):
        assert seen[step]["grad_norm"] == run["grad_norm"][row] and seen[step]["lr"] == pytest.approx(0.01)
        for kind in ("min", "mean", "max"):
            expected = getattr(np, kind)(run["hidden_rms"][row])
            assert seen[step][f"hidden_rms/{kind}"] == pytest.approx(expected)
    # The final read's; the first has one source and no entropy.
    assert seen[0]["depth_entropy/min"] == pytest.approx(np.nanmin(run["depth_entropy"][0]))
    assert not [name for name in seen[0] if name.startswith(("depth_weight", "contribution_rms"))]


def test_one_that_fails_is_said_once_and_costs_nothing(tmp_path, caplog):
    def fails(step, values):
        raise OSError("no network")

    run = recorded(tmp_path / "run", mirror=fails)
    assert run.status == "finished" and run.steps("grad_norm").tolist() == [0, 1, 2]
    assert [r.message for r in caplog.records if "mirror" in r.message] == [
        "depthscope could not mirror its scalars: no network. Recording goes on."
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_sentence_and_leaves_no_run(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(probes.RunError, match=f"mirror='{name}' needs .* pip install {name}"):
        recorded(tmp_path / "run", mirror=name)
    assert not (tmp_path / "run").exists()


def test_another_name_is_refused(tmp_path):
    with pytest.raises(
        probes.RunError, match="mirror is 'tensorbored': give tensorboard, wandb, trackio or a"
    ):
        recorded(tmp_path / "run", mirror="tensorbored")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = recorded(tmp_path / "run", mirror="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("grad_norm")] == [0, 1, 2]
    np.testing.assert_allclose([event.value for event in events.Scalars("grad_norm")], run["grad_norm"])
    np.testing.assert_allclose(
        [event.value for event in events.Scalars("output_rms/max")], run["output_rms"].max(1)
    )


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.raises(probes.RunError, match=r"call wandb\.init first"):
        recorded(tmp_path / "none", mirror="wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", project="depth", dir=tmp_path) as its:
        run = recorded(tmp_path / "run", mirror="wandb")
        summary = dict(its.summary)
    assert summary["depthscope/step"] == 2
    assert summary["depthscope/grad_norm"] == pytest.approx(run["grad_norm"][-1])


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    with pytest.raises(probes.RunError, match=r"call trackio\.init first"):
        recorded(tmp_path / "none", mirror="trackio")
    trackio.init(project="depth", name="its")
    run = recorded(tmp_path / "run", mirror="trackio")
    trackio.finish()
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    found = [row for row in storage.get_logs("depth", "its") if "depthscope/grad_norm" in row]
    assert [row["step"] for row in found] == [0, 1, 2]
    np.testing.assert_allclose([row["depthscope/grad_norm"] for row in found], run["grad_norm"])
