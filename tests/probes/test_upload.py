"""Runs recorded to where they live: through outages, kills and a server that forgets, nothing is lost, as the reader in plain
Python finds that knows nothing but docs/run-format.md."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch

import probes
from probes import compacting, remote
from probes import manifest as files
from probes import writer as writers
from probes.remote import claiming, uploading
from probes.remote import spool as spools
from tests.probes import plain_reader
from tests.probes.away import children
from tests.probes.models import decoder, sgd, train, wait_for

ROOT = Path(__file__).parents[2]
TIMED = {"wall_time", "step_time", "probe_time"}

JOB = """
import logging, os, sys, time
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import probes
from probes import writer
from tests.probes.models import decoder, sgd, train
writer.SEAL_SECONDS = 0.2
url, steps, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = decoder("full", blocks=1)
optimizer = sgd(model)
train(model, optimizer, resume)
recorder = probes.record(model, url, optimizer=optimizer, every=1, matrices_every=5, resume=resume if resume else False)
for step in range(resume, steps):
    train(model, optimizer, 1, step, after=lambda loss: recorder.log(loss=loss))
    time.sleep(0.02)
    print("step", step, flush=True)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Seals at every chance, and tries again without long waits."""
    monkeypatch.setattr(writers, "SEAL_SECONDS", 0.1)
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.2)
    for name, seconds in (
        ("PASS_SECONDS", 0.1),
        ("BEAT_SECONDS", 0.2),
        ("OFFLINE_SECONDS", 0.5),
        ("_LAST_WAIT", 0.5),
    ):
        monkeypatch.setattr(uploading, name, seconds)


def recording(path, model=None, **options):
    model = decoder("full", blocks=1) if model is None else model
    optimizer = sgd(model)
    recorder = probes.record(model, path, optimizer=optimizer, every=1, matrices_every=5, **options)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            train(model, optimizer, 1, step, after=lambda loss: recorder.log(loss=loss))

    return recorder, steps, model


def rows(run: Path) -> dict:
    """What the reader in plain Python finds, but for times."""
    found = plain_reader.read(run)
    return {name: json.dumps(each) for name, each in found.items() if name not in TIMED}


def undisturbed(tmp_path: Path, last: int) -> dict:
    recorder, steps, _ = recording(tmp_path / "undisturbed")
    steps(0, last)
    recorder.close()
    return rows(tmp_path / "undisturbed")


def in_spool() -> list[Path]:
    return [path for path in spools.root().rglob("*.safetensors")]


def wait_for_arrival(server, run: str) -> None:
    wait_for(
        lambda: {path.name for path in in_spool()} <= {name.split("/")[-1] for name in server.names(run)}, 60
    )


@pytest.mark.parametrize("forgets", [False, True], ids=["restarted", "restarted without what it had"])
def test_a_server_that_is_killed_during_a_run_loses_nothing(tmp_path, bucket, caplog, forgets):
    name = f"killed-{forgets}"
    recorder, steps, model = recording(f"s3://bucket/runs/{name}")
    steps(0, 20)
    wait_for(lambda: any(each.endswith(".safetensors") for each in bucket.names(f"runs/{name}")))
    bucket.port.close()
    steps(20, 30)
    wait_for(lambda: "does not take the recording" in caplog.text, 60)
    if forgets:
        bucket.forget_everything()
    steps(30, 40)
    bucket.port.open()
    steps(40, 50)
    wait_for_arrival(bucket, f"runs/{name}")
    recorder.close()
    assert not spools.root().exists() or not list(spools.root().iterdir())
    there = bucket.fetch(f"runs/{name}", tmp_path / "there")
    assert rows(there) == undisturbed(tmp_path, 50)
    run = probes.open_run(f"s3://bucket/runs/{name}")
    assert run.status == "finished" and run.problems == [] and run.last_step == 49
    assert caplog.text.count("does not take the recording") == 1
    assert ("has lost what had arrived there" in caplog.text) == forgets
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()] + list(there.rglob("*.json"))
    assert not any(b"secret-of-the-test" in path.read_bytes() for path in kept)
    assert "secret-of-the-test" not in caplog.text
    assert model is not None


def test_offline_from_the_first_step_to_the_last(tmp_path, bucket, caplog):
    bucket.port.close()
    try:
        recorder, steps, model = recording("s3://bucket/runs/offline")
        steps(0, 12)
        recorder.close()
        (home,) = spools.left()
        said = caplog.messages[-1]
        assert "of s3://bucket/runs/offline are not uploaded (" in said and said.endswith(
            f"depthscope upload {home}"
        )
        before = rows(home / "offline")
        with pytest.raises(probes.RunError, match="never uploaded as a whole: continue it with resume=True"):
            recording("s3://bucket/runs/offline")
        with pytest.raises(probes.RunError, match="nobody knows whether there is a run to continue"):
            recording("s3://bucket/runs/other", resume=3)
    finally:
        bucket.port.open()
    assert uploading.send(home).endswith("is empty now and was removed.") and not home.exists()
    assert rows(bucket.fetch("runs/offline", tmp_path / "there")) == before == undisturbed(tmp_path, 12)
    # Training was what it is without a probe.
    alone = decoder("full", blocks=1)
    train(alone, sgd(alone), 12)
    assert all(map(torch.equal, alone.state_dict().values(), model.state_dict().values()))


def test_a_killed_recording_is_sent_later(tmp_path, bucket):
    job = [sys.executable, "-c", JOB, "s3://bucket/runs/killed", "100000", "0"]
    child = subprocess.Popen(
        job, cwd=ROOT, env=children(bucket), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        said = iter(child.stdout)
        next(line for line in said if line == "step 20\n")
        wait_for(lambda: any(name.endswith(".safetensors") for name in bucket.names("runs/killed")))
        bucket.port.close()
        (home,) = spools.left()
        arrived = sum(name.endswith(".safetensors") for name in bucket.names("runs/killed"))
        while len(list(home.rglob("[0-9]*.safetensors"))) <= arrived:
            next(said)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    sealed = shutil.copytree(home / "killed", tmp_path / "sealed")
    bucket.port.open()
    command = [sys.executable, "-m", "app.cli", "upload"]
    done = subprocess.run(
        command, cwd=ROOT, env=children(bucket), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "files sent" in done.stdout, done
    assert not home.exists()
    there = bucket.fetch("runs/killed", tmp_path / "there")
    assert rows(there) == rows(sealed)


@pytest.mark.long
def test_a_run_is_continued_by_a_script_that_ends_without_a_word(tmp_path, bucket):
    recorder, steps, _ = recording("s3://bucket/runs/alone")
    steps(0, 20)
    recorder.close()
    sealed = bucket.fetch("runs/alone", tmp_path / "sealed")
    last = max(step for step, _ in plain_reader.read(sealed)["loss"])
    job = [
        sys.executable,
        "-c",
        JOB,
        "s3://bucket/runs/alone",
        str(last + 5),
        str(last - 5),
    ]
    # By a name, which has to be looked up: at the very end of a script nobody could.
    named = {"AWS_ENDPOINT_URL": f"http://localhost:{bucket.port.number}"}
    done = subprocess.run(
        job, cwd=ROOT, env=children(bucket) | named, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    there = bucket.fetch("runs/alone", tmp_path / "continued")
    assert rows(there) == undisturbed(tmp_path, last + 5)
    assert not list(spools.root().iterdir())  # a script that ends without a word has sent everything


@pytest.mark.long
def test_a_killed_recording_is_sent_by_the_one_that_continues_it(tmp_path, bucket):
    url = "s3://bucket/runs/continued"
    bucket.port.close()
    job = [sys.executable, "-c", JOB, url, "100000", "0"]
    child = subprocess.Popen(
        job, cwd=ROOT, env=children(bucket), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        next(line for line in child.stdout if line == "step 60\n")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        bucket.port.open()
    model = decoder("full", blocks=1)
    train(model, sgd(model), 20)
    recorder, steps, _ = recording(url, model, resume=20)
    steps(20, 30)
    recorder.close()
    run = probes.open_run(url)
    assert [attempt.step for attempt in run.attempts] == [0, 20] and run.problems == []
    assert rows(bucket.fetch("runs/continued", tmp_path / "there")) == undisturbed(tmp_path, 30)


def test_two_writers_on_one_run_are_refused(bucket, monkeypatch, tmp_path):
    url = "s3://bucket/runs/two"
    recorder, steps, _ = recording(url)
    steps(0, 3)
    with pytest.raises(
        probes.RunError,
        match=r"already holds a run: give another path, .* or continue the run with resume=True",
    ):
        recording(url)
    # On another machine, where nothing of it lies.
    monkeypatch.setenv("DEPTHSCOPE_SPOOL", str(tmp_path / "other spool"))
    with pytest.raises(probes.RunError, match=f"two is being recorded by process {os.getpid()} on"):
        recording(url, resume=2)
    recorder.close()
    monkeypatch.setattr(claiming, "WATCH_SECONDS", 1.0)
    with pytest.raises(probes.RunError, match="already holds a run"):
        recording(url)
    second, steps, _ = recording(url, resume=2)
    steps(2, 5)
    second.close()
    assert [attempt.step for attempt in probes.open_run(url).attempts] == [0, 2]


def test_a_bucket_that_is_not_there_is_named(bucket, caplog):
    recorder, steps, _ = recording("s3://nowhere/runs/a")
    steps(0, 2)
    recorder.close()
    begun, ended = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "(there is no s3://nowhere to write into: make it, or give another address)" in begun
    assert "are not uploaded" in ended


def test_of_two_that_began_offline_the_first_to_arrive_has_the_place(bucket, monkeypatch, tmp_path, caplog):
    url = "s3://bucket/runs/first"
    bucket.port.close()
    first, steps_of_first, _ = recording(url)
    monkeypatch.setenv("DEPTHSCOPE_SPOOL", str(tmp_path / "other spool"))
    second, steps_of_second, _ = recording(url)
    steps_of_first(0, 3)
    steps_of_second(0, 4)
    bucket.port.open()
    wait_for(lambda: "Another run than the one recorded here was begun" in caplog.text, 60)
    first.close()
    second.close()
    losers = [
        path
        for path in (*(tmp_path / "other spool").iterdir(), *(tmp_path / "home" / "spool").glob("*"))
        if path.is_dir()
    ]
    (loser,) = losers
    assert (
        caplog.messages[-1].endswith(f"depthscope upload {loser} OTHER-ADDRESS")
        or "OTHER-ADDRESS" in caplog.text
    )
    with pytest.raises(probes.RunError, match="Another run than the one recorded here"):
        uploading.send(loser)
    uploading.send(loser, "s3://bucket/runs/second")
    found = {probes.open_run(f"s3://bucket/runs/{name}").last_step for name in ("first", "second")}
    assert found == {2, 3}


def test_a_full_spool_leaves_a_gap_that_is_told(bucket, monkeypatch, caplog):
    monkeypatch.setenv(spools.SIZE, "100kB")
    bucket.port.close()
    try:
        recorder, steps, _ = recording("s3://bucket/runs/small")
        for first in range(0, 200, 20):
            steps(first, first + 20)
            if "no more may" in caplog.text:
                break
            wait_for(lambda: recorder._writer._queue.empty())
        recorder.close()
    finally:
        bucket.port.open()
    assert "no more may" in caplog.text
    (home,) = spools.left()
    uploading.send(home)
    run = probes.open_run("s3://bucket/runs/small")
    assert run.status == "finished" and any(
        "wait there to be uploaded" in problem for problem in run.problems
    )
    assert len(run.steps("loss"))


@pytest.mark.long
def test_what_has_arrived_leaves_a_spool_that_fills(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv(spools.SIZE, "150kB")
    monkeypatch.setattr(compacting, "ROWS", 20)
    recorder, steps, _ = recording("s3://bucket/runs/long")
    removed = False
    for first in range(0, 400, 10):
        steps(first, first + 10)
        wait_for(lambda: recorder._writer._queue.empty())
        wait_for_arrival(bucket, "runs/long")
        removed |= len(in_spool()) < sum(name.endswith(".safetensors") for name in bucket.names("runs/long"))
        if removed:
            break
    assert removed
    last = first + 10
    recorder.close()
    assert rows(bucket.fetch("runs/long", tmp_path / "there")) == undisturbed(tmp_path, last)
    run = probes.open_run("s3://bucket/runs/long")
    assert run.problems == [] and run.last_step == last - 1


def test_memory_is_a_place_too(apart, tmp_path):
    fsspec.filesystem("memory").store.clear()
    with recording("memory://bucket/a")[0] as recorder:
        pass
    assert recorder._writer.uploads and probes.open_run("memory://bucket/a").status == "finished"
    with pytest.raises(probes.RunError, match=r"can be read from hf://, and not recorded to it"):
        recording("hf://datasets/somebody/runs/a")
    recorder, _, _ = recording(f"file://{tmp_path}/here")
    recorder.close()
    assert not recorder._writer.uploads and probes.open_run(tmp_path / "here").status == "finished"
    assert remote.troubles() == []


def test_the_command_says_what_is_left(bucket, tmp_path):
    command = [sys.executable, "-m", "app.cli", "upload"]
    done = subprocess.run(
        command, cwd=ROOT, env=children(bucket), capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "Nothing is left to upload.\n")
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=children(bucket), capture_output=True, text=True
    )
    assert done.returncode == 1 and "is no recording that waits to be uploaded" in done.stderr
