"""Preempted and continued: one run of several attempts, whose rows are those of the latest."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import probes
from probes import life
from probes import manifest as files
from probes.attempts import attempt_folder
from probes.layout import Layer, Layout, difference
from tests.probes.models import decoder, recorded, sgd, shards, train, wait_for

ROOT = Path(__file__).parents[2]


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def attempt(path, resume, steps, kind="full", make=sgd, leave=False, **options):
    """Train `steps` steps of a recording that goes on at step `resume`; the loss is the step's number."""
    model = decoder(kind, blocks=1)
    optimizer = make(model)
    start = resume if type(resume) is int else 0
    recorder = probes.record(
        model, path, optimizer=optimizer, resume=resume, **{"every": 2, "matrices_every": 4} | options
    )
    for step in range(start, start + steps):
        train(
            model,
            optimizer,
            1,
            start=step,
            after=lambda loss, step=step: recorder.log(loss=step + start / 1000),
        )
    recorder.close(*(("stopped", "preempted") if leave else ()))
    return model, optimizer


def test_rewound_steps_are_hidden_and_kept(tmp_path):
    path = tmp_path / "run"
    attempt(path, False, 9, leave=True)
    before = {shard: shard.read_bytes() for shard in path.rglob("*.*") if shard.name != "run.json"}
    attempt(path, 5, 6)
    run = probes.open_run(path)
    assert run.status == "finished" and run.last_step == 10
    assert run.steps("loss").tolist() == list(range(11))
    np.testing.assert_allclose(run["loss"], [0, 1, 2, 3, 4, *(s + 0.005 for s in range(5, 11))])
    assert run.steps("hidden_rms").tolist() == [0, 2, 4, 6, 8, 10]
    assert run.steps("depth_weight").tolist() == [0, 4, 8]
    first, second = run.attempts
    assert (first.step, first.hidden_from, first.last_step, first.status_reason) == (0, 5, 4, "preempted")
    assert (second.step, second.hidden_from, second.last_step, second.status) == (5, None, 10, "finished")
    assert run.gaps == [] and run.problems == []
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is deleted"


def test_attempts_that_go_back_further_and_further(tmp_path):
    path = tmp_path / "run"
    for start, steps in ((0, 8), (6, 6), (3, 4), (5, 3)):
        attempt(path, start, steps, leave=True)
    run = probes.open_run(path)
    assert [each.hidden_from for each in run.attempts] == [3, 3, 5, None]
    assert run.steps("loss").tolist() == list(range(8))
    np.testing.assert_allclose(run["loss"], [0, 1, 2, 3.003, 4.003, 5.005, 6.005, 7.005])


def test_a_dashboard_that_looks_on_sees_the_rows_change(tmp_path):
    path = tmp_path / "run"
    attempt(path, False, 9, leave=True)
    run = probes.open_run(path)
    assert (run.status, run.last_step) == ("stopped", 8)
    attempt(path, 5, 2)
    assert run.refresh() and not run.refresh()
    assert (run.status, run.last_step) == ("finished", 6)
    np.testing.assert_allclose(run["loss"], [0, 1, 2, 3, 4, 5.005, 6.005])


def test_the_step_is_adams_own(tmp_path):
    path = tmp_path / "run"
    model, optimizer = attempt(path, True, 4, make=adam)  # no run yet: it is begun
    saved = optimizer.state_dict()

    def loaded(model):
        optimizer = adam(model)
        optimizer.load_state_dict(saved)
        return optimizer

    model = decoder(blocks=1)
    optimizer = loaded(model)
    with probes.record(model, path, optimizer=optimizer, resume=True, every=1):
        train(model, optimizer, 2, start=4)
    run = probes.open_run(path)
    assert [each.step for each in run.attempts] == [0, 4]
    assert run.steps("hidden_rms").tolist() == [0, 2, 4, 5]


def test_an_unknown_step_is_asked_for(tmp_path):
    path = tmp_path / "run"
    attempt(path, False, 2)
    for make in (sgd, adam):  # one that never counts, and one whose state was not loaded
        with pytest.raises(probes.RunError, match=r"cannot tell at which step training goes on.*resume=1000"):
            attempt(path, True, 1, make=make)
    for wrong in ("yes", -1, 1.5, None):
        with pytest.raises(
            probes.RunError, match=r"resume is .*: give the step at which training goes on, or True"
        ):
            attempt(path, wrong, 1)
    assert len(probes.open_run(path).attempts) == 1
    attempt(path, 0, 1)  # from the beginning
    assert probes.open_run(path).steps("loss").tolist() == [0]


def test_a_run_that_begins_late(tmp_path):
    attempt(tmp_path / "run", 100, 3)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("loss").tolist() == [100, 101, 102] and run.gaps == []


@pytest.mark.parametrize(
    "kind, options, sentence",
    [
        ("full", {"blocks": 2}, "recorded with 2 layers, and this one has 4"),
        ("block of 2", {"blocks": 1}, "recorded with 3 sources, and this one has 2"),
    ],
)
def test_another_model_is_refused_with_what_differs(kind, options, sentence, tmp_path):
    attempt(tmp_path / "run", False, 2)
    model = decoder(kind, **options)
    with pytest.raises(
        probes.RunError, match=f"cannot be continued with this model: .*{sentence}.*another path"
    ):
        probes.record(model, tmp_path / "run", resume=2)
    assert not attempt_folder(tmp_path / "run", 1).exists()


def test_what_sets_two_layouts_apart():
    def layout(names=("a", "b"), counts=None):
        layers = [Layer(i, "layer", 1, name) for i, name in enumerate(names, 1)]
        return Layout.build(layers, counts)

    assert difference(layout(), layout()) == difference(layout(), layout(("_orig_mod.a", "b"))) == ""
    assert difference(layout(), layout(("a", "c"))) == "its layer 2 was b, and here layer 2 is c"
    assert difference(layout("abcd", [1, 2, 2, 3, 3]), layout("abcd", [1, 2, 2, 2, 3])) == (
        "its layer 4 had 3 sources, and here layer 4 has 2"
    )


def test_wall_time_goes_on_where_it_was_and_knows_no_clock(tmp_path, monkeypatch):
    path = tmp_path / "run"
    attempt(path, False, 9, leave=True)
    before = probes.open_run(path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e6)  # the other machine's clock is eleven days slow
    attempt(path, 5, 6)
    monkeypatch.undo()
    run = probes.open_run(path)
    seconds = run["wall_time"]
    assert (np.diff(seconds) > 0).all() and (seconds >= 0).all() and seconds[-1] < 600
    np.testing.assert_array_equal(seconds[:3], before["wall_time"][:3])
    assert run.status == "finished" and run.last_step == 10


@pytest.mark.parametrize("hour", [-3600, 3600])
def test_a_heartbeat_is_believed_when_it_moves_whatever_its_clock_says(hour, tmp_path):
    recorded(tmp_path / "run", 1)
    (tmp_path / "run" / files.END).unlink()
    beat = {"time": time.time() + hour, "step": 0}
    (tmp_path / "run" / files.HEARTBEAT).write_text(json.dumps(beat))
    run = probes.open_run(tmp_path / "run")
    assert run.status == "stopped"  # a clock that is wrong, or a process long dead
    (tmp_path / "run" / files.HEARTBEAT).write_text(json.dumps(beat | {"time": beat["time"] + 2}))
    assert run.status == "running"


# Two writers


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(life, "WATCH_SECONDS", 5.0)
    model = decoder(blocks=1)
    with probes.record(model, tmp_path / "run"):
        sentence = (
            rf"is being recorded by process {os.getpid()} on .*: stop that one first, or give another path"
        )
        with pytest.raises(probes.RunError, match=sentence):
            probes.record(decoder(blocks=1), tmp_path / "run", resume=1)
    with probes.record(model, tmp_path / "run", resume=1), pytest.raises(probes.RunError, match=sentence):
        probes.record(decoder(blocks=1), tmp_path / "run", resume=1)
    assert len(probes.open_run(tmp_path / "run").attempts) == 2


def test_a_dead_writer_of_this_machine_is_known_at_once(tmp_path, monkeypatch):
    path = tmp_path / "run"
    attempt(path, False, 2)
    (path / files.END).unlink()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    beat = json.loads((path / files.HEARTBEAT).read_text())
    (path / files.HEARTBEAT).write_text(json.dumps(beat | {"pid": child.pid}))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    assert not life.beating(path)


@pytest.mark.parametrize("changes", [{"machine": "another"}, {"pid": os.getpid()}, {"pid": -1}, {"pid": "x"}])
def test_a_writer_elsewhere_is_watched_and_not_waited_for_longer(changes, tmp_path, monkeypatch):
    """Another host's process cannot be asked for; nor is a living process with its number proof that it lives."""
    monkeypatch.setattr(life, "WATCH_SECONDS", 0.3)
    path = tmp_path / "run"
    attempt(path, False, 2)
    (path / files.END).unlink()
    beat = json.loads((path / files.HEARTBEAT).read_text())
    (path / files.HEARTBEAT).write_text(json.dumps(beat | changes))
    attempt(path, 1, 2)
    assert probes.open_run(path).steps("loss").tolist() == [0, 1, 2]


def test_of_two_that_resume_at_once_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(life, "WATCH_SECONDS", 0.3)
    path = tmp_path / "run"
    attempt(path, False, 2)

    def overtaken(folder):
        attempt_folder(path, 1).mkdir()
        return False

    with monkeypatch.context() as patch:
        patch.setattr("probes.place.beating", overtaken)
        with pytest.raises(
            probes.RunError, match="is being recorded by another process: stop that one first"
        ):
            attempt(path, 1, 1)
    assert len(probes.open_run(path).attempts) == 1, "a folder that somebody claimed and left is no attempt"
    attempt(path, 1, 2)
    assert [each.number for each in probes.open_run(path).attempts] == [0, 2]


def test_a_writer_that_was_taken_for_dead_harms_nobody(tmp_path, hasty, caplog, monkeypatch):
    """A paused machine wakes up: what it still writes is its own attempt's, and hidden."""
    monkeypatch.setattr("probes.place.beating", lambda folder: False)
    path = tmp_path / "run"
    model = decoder(blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1) as paused:
        train(model, optimizer, 3)
        wait_for(lambda: len(shards(path)) >= 1)
        attempt(path, 2, 4, every=1)
        train(model, optimizer, 5, start=3, after=lambda loss: paused.log(loss=-1))
        wait_for(lambda: "Another process has continued the run" in caplog.text)
    run = probes.open_run(path)
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3, 4, 5]
    assert run.steps("loss").tolist() == [2, 3, 4, 5] and (run["loss"] > 0).all()
    assert run.status == "finished" and not run.problems


def test_a_run_that_died_while_it_was_begun_is_begun_again(tmp_path, monkeypatch):
    monkeypatch.setattr(life, "WATCH_SECONDS", 0.3)
    path = tmp_path / "run"
    probes.record(decoder(blocks=1), path).close()
    for name in (files.MANIFEST, files.END):
        (path / name).unlink()
    with pytest.raises(probes.RunError, match="There is no run"):
        probes.open_run(path)
    attempt(path, True, 2)
    assert probes.open_run(path).steps("loss").tolist() == [0, 1]


# Gaps


def test_steps_between_two_attempts_are_a_gap(tmp_path):
    path = tmp_path / "run"
    attempt(path, False, 5, leave=True)
    attempt(path, 9, 2)
    run = probes.open_run(path)
    (gap,) = run.gaps
    assert (gap.first, gap.last) == (5, 8)
    assert run.problems == [
        "Steps 5 to 8 are missing: nobody recorded until the run was continued (it had stopped: preempted)."
    ]
    assert run.steps("loss").tolist() == [0, 1, 2, 3, 4, 9, 10]


def test_what_was_received_and_never_sealed_is_a_gap(tmp_path):
    path = tmp_path / "run"
    attempt(path, False, 5)
    (path / files.END).unlink()
    beat = json.loads((path / files.HEARTBEAT).read_text())
    (path / files.HEARTBEAT).write_text(json.dumps(beat | {"time": 0.0, "step": 7}))
    run = probes.open_run(path)
    (gap,) = run.gaps
    assert (gap.first, gap.last) == (5, 7)
    assert gap.cause == "the recording ended before they were sealed" and "since 1970" in run.status_reason
    beat["time"] = time.time()
    (path / files.HEARTBEAT).write_text(json.dumps(beat | {"step": 7}))
    assert probes.open_run(path).gaps == [], "a living one has yet to seal them"


def test_shards_that_vanished_are_a_gap(tmp_path, hasty):
    path = tmp_path / "run"
    model = decoder(blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1):
        for step in range(5):
            train(model, optimizer, 1, start=step)
            wait_for(lambda step=step: len(shards(path)) == step)
    assert len(shards(path)) == 5
    for taken, gap in (({1, 2}, (1, 2)), ({0}, (0, 0)), ({4}, (4, 4)), (set(range(5)), (0, 4))):
        copy = tmp_path / f"without {taken}"
        shutil.copytree(path, copy)
        for number in taken:
            (copy / files.RANK_FOLDER / shards(path)[number].name).unlink()
        run = probes.open_run(copy)
        assert [(each.first, each.last) for each in run.gaps] == [gap]
        assert "gone from the folder" in run.problems[0]


RESTARTED = """
import logging, sys
from pathlib import Path
import probes
from tests.probes.crashes import may_mount, mount
from tests.probes.models import decoder, sgd, train, wait_for

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("depthscope").addHandler(handler)
place = Path(sys.argv[1])
if not may_mount(place):
    sys.exit("may not mount")
mount("-t", "tmpfs", "tmpfs", place)

def attempt(resume, *middle):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, place / "run", optimizer=optimizer, every=1, resume=resume) as recorder:
        for start, act in zip((resume, resume + 2), (*middle, lambda: None)):
            train(model, optimizer, 2, start=start)
            act()

attempt(0, lambda: None)
mount("-o", "remount,ro", place)
sealed = lambda: list((place / "run" / "attempt-00001").glob("*/*.safetensors"))

def back():
    wait_for(lambda: said)
    mount("-o", "remount,rw", place)
    wait_for(sealed)

attempt(4, back)
run = probes.open_run(place / "run")
print(*said, sep="\\n")
print(len(run.attempts), run.steps("hidden_rms").tolist(), run.status, run.gaps)
"""


def test_a_job_started_again_on_a_disk_that_refuses_trains_and_records_later(tmp_path):
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-c",
        RESTARTED,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if "may not mount" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip("this process may not mount")
    assert done.returncode == 0, done.stderr
    warned, read = done.stdout.splitlines()
    assert warned == (
        f"depthscope cannot write to {tmp_path / 'run'}: Read-only file system. Training goes on; recording does too when "
        "the place is back."
    )
    assert read == "2 [0, 1, 2, 3, 4, 5, 6, 7] finished []"
