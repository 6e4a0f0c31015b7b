"""Runs that grow and are read while they do, what is logged to them, and folders of runs."""

import os
import time

import numpy as np
import pytest
import torch

import probes
from probes import manifest as files
from probes.run import find_runs
from tests.probes.models import batches, decoder, loss_of, recorded, sgd, shards, train, wait_for


def test_a_growing_run(tmp_path, hasty):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        run = probes.open_run(tmp_path / "run")
        assert (run.status, run.metrics, run.last_step) == ("running", [], -1)
        train(model, optimizer, 3)
        wait_for(lambda: (run.refresh(), run.last_step == 1)[1])
        recorder.log(val_loss=2.0)  # still belongs to step 2, so step 2 must not have been sealed
        time.sleep(0.5)
        run.refresh()
        assert run.last_step == 1
        assert not run.refresh()
        train(model, optimizer, 1, start=3)
        wait_for(lambda: (run.refresh(), run.last_step == 2)[1])
        assert run.steps("val_loss").tolist() == [2]
        before = run["hidden_rms"]
    assert run.refresh()
    assert run.status == "finished"
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(run["hidden_rms"][:3], before)
    assert len(shards(tmp_path / "run")) >= 3


def test_a_recorded_step_is_sealed_without_waiting_for_the_next(tmp_path, hasty):
    """Nothing is logged and the next look is far away: the step is shown all the same."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1000, matrices_every=1000):
        train(model, optimizer, 2)
        run = probes.open_run(tmp_path / "run")
        wait_for(lambda: (run.refresh(), run.last_step == 0)[1])  # it may have been there when opened


# log and now


def test_log_belongs_to_the_latest_training_forward(tmp_path):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=10) as recorder:
        recorder.log(before=0)
        for step in range(25):
            loss = loss_of(model(tokens), tokens)
            recorder.log(loss=loss, host=step)
            loss.backward()
            optimizer.step()
            recorder.log(after=step)
            with torch.no_grad():
                model(tokens)
            model.eval()(tokens)
            model.train()
            if step % 7 == 3:
                recorder.log(val_loss=torch.tensor(float(step)))
    run = probes.open_run(tmp_path / "run")
    for name in ("loss", "host", "after"):
        assert run.steps(name).tolist() == list(range(25)), "every value is kept, not each tenth"
    assert run["host"].tolist() == run["after"].tolist() == list(range(25))
    assert run.steps("val_loss").tolist() == run["val_loss"].tolist() == [3, 10, 17, 24]
    assert run.steps("before").tolist() == [0]
    assert run.steps("hidden_rms").tolist() == [0, 10, 20]


def test_under_accumulation_a_step_keeps_every_logged_value(tmp_path):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        for step in range(2):
            for part, tokens in enumerate(batches(step)):
                loss_of(model(tokens), tokens).backward()
                recorder.log(part=part, mixed=torch.tensor(1.0 * part) if part else 0.0)
            optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("part").tolist() == [0, 0, 0, 1, 1, 1]
    assert run["part"].tolist() == [0, 1, 2] * 2
    assert run.steps("mixed").tolist() == [0, 0, 0, 1, 1, 1]
    assert run.steps("hidden_rms").tolist() == [0, 1]


@pytest.mark.parametrize(
    "scalars, sentence",
    [
        ({"loss": "high"}, "takes a number, not 'high'"),
        ({"loss": None}, "takes a number, not None"),
        ({"loss": torch.ones(3)}, "takes a single real number, not a torch.float32 tensor of 3"),
        ({"hidden_rms": 1.0}, "kept for depthscope's own"),
        ({"my.step": 1.0}, "kept for depthscope's own"),
    ],
)
def test_what_log_refuses(scalars, sentence, tmp_path):
    with (
        probes.record(decoder("prenorm", blocks=1), tmp_path / "run") as recorder,
        pytest.raises(ValueError, match=sentence),
    ):
        recorder.log(**scalars)


def test_what_the_script_logs_itself_is_not_recorded_twice(tmp_path):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        for step in range(3):
            train(model, optimizer, 1, start=step)
            recorder.log(lr=7.0, grad_norm=8.0)
    run = probes.open_run(tmp_path / "run")
    for name, logged in (("lr", 7.0), ("grad_norm", 8.0)):
        # The first step was recorded before the script said that it logs these.
        assert run.steps(name).tolist() == [0, 0, 1, 2]
        assert run[name][1:].tolist() == [logged] * 3


def test_a_recorder_that_saw_no_step_says_so(tmp_path, caplog):
    model = decoder("prenorm", blocks=1)
    with probes.record(model, tmp_path / "run", every=1):
        train(model, sgd(model), 2)
    assert "recorder.step()" in caplog.text


def test_now_records_one_step_with_matrices(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=100) as recorder:
        train(model, optimizer, 3)
        recorder.now()
        train(model, optimizer, 3, start=3)
        train(model, optimizer, 2, start=6, after=lambda loss: recorder.now())
        train(model, optimizer, 3, start=8)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("depth_weight").tolist() == run.steps("hidden_rms").tolist() == [0, 3, 7, 8]


def test_steps_by_hand_and_steps_without_a_forward(tmp_path):
    model = decoder("prenorm", blocks=1)
    with probes.record(model, tmp_path / "run", every=1) as recorder:
        (tokens,) = batches(0, [(2, 8)])
        for step in range(4):
            if step != 2:
                loss_of(model(tokens), tokens).backward()
            recorder.step()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == run.steps("step_time").tolist() == [0, 1, 3]


# Folders


def test_list_runs(tmp_path):
    assert list(probes.list_runs(tmp_path)) == []
    with pytest.raises(probes.RunError, match=r"There is no folder .*nowhere: give a folder that holds runs"):
        list(probes.list_runs(tmp_path / "nowhere"))
    recorded(tmp_path / "b" / "deep", 1)
    recorded(tmp_path / "a", 1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / files.MANIFEST).write_text("{")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / files.MANIFEST).write_text("{}")
    assert [run.name for run in probes.list_runs(tmp_path)] == ["a", "deep"]
    assert [run.name for run in probes.list_runs(tmp_path / "a")] == ["a"]
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b" / "deep", tmp_path / "broken"]


def test_what_was_not_recorded_is_a_key_error_that_says_what_was(tmp_path):
    run = recorded(tmp_path / "run", 1)
    assert "hidden_rms" in run and "val_loss" not in run
    with pytest.raises(KeyError, match="did not record 'val_loss'; it has: block_grad_rms, block_rms"):
        run["val_loss"]
    assert not run["hidden_rms"].flags.writeable


def test_an_existing_run_and_other_peoples_files_are_left_alone(tmp_path):
    model = decoder("prenorm", blocks=1)
    recorded(tmp_path / "run", 1)
    with pytest.raises(
        probes.RunError, match="already holds a run: give another path, or delete that folder"
    ):
        probes.record(model, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    with pytest.raises(probes.RunError, match="is not empty: give a new folder for the run"):
        probes.record(model, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with probes.record(model, tmp_path / "empty"):
        pass
    with pytest.raises(probes.RunError, match=r"The run cannot be recorded at .*: Not a directory"):
        probes.record(model, tmp_path / "full" / "thesis.txt" / "run")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(probes.RunError, match=r"cannot be recorded at .*: Permission denied"):
        probes.record(decoder("prenorm", blocks=1), tmp_path / "locked" / "run")
