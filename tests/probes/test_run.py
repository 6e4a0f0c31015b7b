"""Runs that grow, end, break and are read all the same."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import probes
from probes import manifest as files
from probes import writer as writer_module
from probes.run import find_runs
from tests.probes.models import batches, decoder, loss_of, sgd, train


def recorded(path, steps: int = 3, **options):
    """A finished run of a small model."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **{"every": 1, "matrices_every": 2} | options):
        train(model, optimizer, steps)
    return probes.open_run(path)


def shards(path):
    return sorted((path / files.RANK_FOLDER).glob("*.safetensors"))


def wait_for(condition, seconds: float = 20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def hasty(monkeypatch):
    """A writer that seals at every chance."""
    monkeypatch.setattr(writer_module, "SEAL_SECONDS", 0.0)
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.0)


# While it grows


def test_a_growing_run(tmp_path, hasty):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        run = probes.open_run(tmp_path / "run")
        assert (run.status, run.metrics, run.last_step) == ("running", [], -1)
        train(model, optimizer, 3)
        wait_for(lambda: run.refresh() and run.last_step == 1)
        recorder.log(val_loss=2.0)  # still belongs to step 2, so step 2 must not have been sealed
        time.sleep(0.5)
        run.refresh()
        assert run.last_step == 1
        assert not run.refresh()
        train(model, optimizer, 1, start=3)
        wait_for(lambda: run.refresh() and run.last_step == 2)
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
        wait_for(lambda: run.refresh() and run.last_step == 0)


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
        ({"loss": torch.ones(3)}, "takes a single number, not a tensor of 3 values"),
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


# How it ends

SCRIPT = """
import os, signal, sys, time
import torch
import probes
from probes import manifest, writer
from tests.probes.models import decoder, sgd, train
model = decoder("prenorm", blocks=1)
optimizer = sgd(model)
recorder = probes.record(model, sys.argv[1], optimizer=optimizer, every=1)
train(model, optimizer, 2)
"""

ENDINGS = {
    "normal exit": ("", "finished", "", 0),
    "sys.exit": ("sys.exit(0)", "finished", "", 0),
    "exception": ("raise ValueError('no good')", "stopped", "ValueError: no good", 1),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "stopped", "KeyboardInterrupt", None),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "stopped", "SIGTERM", -signal.SIGTERM),
    "closed, then an exception": ("recorder.close(); raise ValueError('later')", "finished", "", 1),
    "a forked child": (
        """
child = os.fork()
if not child:
    train(model, optimizer, 1, start=7)  # its own model, nobody's run
    recorder.close()
    sys.exit(0)
os.waitpid(child, 0)
assert not (recorder._writer.path / "end.json").exists()
train(model, optimizer, 1, start=2)
""",
        "finished",
        "",
        0,
    ),
    "a terminated child": (
        """
child = os.fork()
if not child:
    time.sleep(30)
    os._exit(1)
time.sleep(1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
assert not (recorder._writer.path / "end.json").exists()
""",
        "finished",
        "",
        0,
    ),
}


def run_script(path, ending: str, **options):
    script = SCRIPT + textwrap.dedent(ending)
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("how", ENDINGS)
def test_endings_of_a_process(how, tmp_path):
    ending, status, reason, code = ENDINGS[how]
    done = run_script(tmp_path / "run", ending)
    if code is not None:
        assert done.returncode == code, done.stderr
    run = probes.open_run(tmp_path / "run")
    assert (run.status, run.status_reason) == (status, reason), done.stderr
    assert run.steps("hidden_rms").tolist()[:2] == [0, 1] and not run.problems
    end = json.loads((tmp_path / "run" / files.END).read_text())
    assert end["step"] == run.last_step and end["dropped"] == 0


def test_kill_nine_leaves_what_was_sealed_and_no_end(tmp_path, monkeypatch):
    path = tmp_path / "run"
    done = run_script(
        path,
        """
        writer.SEAL_SECONDS = 0.0
        while not list((recorder._writer.path / manifest.RANK_FOLDER).glob("*.safetensors")):
            train(model, optimizer, 1)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.returncode == -signal.SIGKILL
    run = probes.open_run(path)
    assert run.status == "running"  # it was alive a moment ago
    assert run.last_step >= 0 and not run.problems
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.0)
    assert run.status == "stopped"
    assert run.status_reason.startswith("no sign of life since 20")
    assert run.status_reason.endswith("UTC, and no end marker")


def test_somebody_elses_sigterm_handler_stays(tmp_path):
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with probes.record(decoder("prenorm", blocks=1), tmp_path / "run"):
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_default_sigterm_handler_comes_back(tmp_path):
    with probes.record(decoder("prenorm", blocks=1), tmp_path / "run"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Damage


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A run of two shards, each a few kilobytes."""
    path = tmp_path_factory.mktemp("damage") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SEAL_SECONDS", 0.0)
        model = decoder("full", blocks=1)
        optimizer = sgd(model)
        with probes.record(model, path, optimizer=optimizer, every=1):
            train(model, optimizer, 2)
            wait_for(lambda: len(shards(path)) == 1)
    assert len(shards(path)) == 2
    return path


def damaged(path, content: bytes):
    """The run as it reads with other content in its first shard."""
    first, _ = shards(path)
    sound = first.read_bytes()
    first.unlink()  # a new file: the old one may be mapped into memory
    first.write_bytes(content)
    try:
        return probes.open_run(path)
    finally:
        first.unlink()
        first.write_bytes(sound)


def assert_reported(run, what):
    assert len(run.problems) == 1, what
    assert run.problems[0].startswith(
        "Steps 0 to 0 are missing: shard 000000000000-000000000000.safetensors "
    )
    assert run.steps("hidden_rms").tolist() == [1], what


def test_every_kind_of_truncation_is_reported(two_shards):
    sound = shards(two_shards)[0].read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(sound) - 1):
        assert_reported(damaged(two_shards, sound[:length]), length)
    assert_reported(damaged(two_shards, sound + b"\0"), "a byte more")
    assert_reported(damaged(two_shards, bytes(len(sound))), "zeros")


def test_flipped_bits_are_reported_wherever_they_are(two_shards):
    """The length, the JSON header, the metadata, the numbers: one bit each, at many places."""
    sound = shards(two_shards)[0].read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    generator = np.random.default_rng(0)
    crc = sound.index(b"crc32")
    places = [*range(8), *range(crc - 2, crc + 18)]
    places += (
        generator.integers(8, header, 150).tolist() + generator.integers(header, len(sound), 60).tolist()
    )
    for place in places:
        for bit in (0, 5) if place < 8 else (int(generator.integers(8)),):
            broken = bytearray(sound)
            broken[place] ^= 1 << bit
            assert_reported(damaged(two_shards, bytes(broken)), (place, bit))


def test_files_that_are_no_shards_are_passed_over(two_shards):
    folder = two_shards / files.RANK_FOLDER
    others = [folder / ".000-001.safetensors.tmp-1", folder / "notes.txt", folder / "mine.safetensors"]
    for other in others:
        other.write_bytes(b"half")
    run = probes.open_run(two_shards)
    assert not run.problems and run.steps("hidden_rms").tolist() == [0, 1]
    for other in others:
        other.unlink()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "null", '{"format": 1}', "{}", "\0\0", b"\xff\xfe"]
)
def test_a_garbled_manifest_gets_one_sentence(content, tmp_path):
    path = tmp_path / files.MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(probes.RunError, match=r"cannot be opened: its run\.json is") as caught:
        probes.open_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, value",
    [
        (["layout", "reads", 0, "sources"], 99),
        (["layout", "reads", 0, "sources"], "2"),
        (["layout", "reads", 0, "surprise"], 1),
        (["layout", "reads"], []),
        (["layout", "layers", 0, "block"], None),
        (["layout", "layers"], "none"),
        (["layout", "sources"], [1]),
        (["created"], 1e300),
        (["created"], "today"),
        (["created"], float("nan")),
        (["every"], None),
        (["config"], [1]),
        (["format"], "new"),
    ],
)
def test_a_manifest_with_a_wrong_value_gets_one_sentence(keys, value, two_shards, tmp_path):
    data = json.loads((two_shards / files.MANIFEST).read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / files.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(probes.RunError, match="not a depthscope manifest"):
        probes.open_run(tmp_path)


def test_no_run_and_newer_runs_get_one_sentence(two_shards, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            probes.RunError, match=r"There is no run at .*: it has no run\.json\. Give the folder"
        ):
            probes.open_run(path)
    data = json.loads((two_shards / files.MANIFEST).read_text()) | {"format": 2, "layout": "something new"}
    (tmp_path / files.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(probes.RunError, match=r"format 2, newer than this depthscope reads \(1\): upgrade"):
        probes.open_run(tmp_path)


@pytest.mark.parametrize("content", ['{"time": 1e300}', '{"time": NaN}', '{"time": "x"}', "[]", "{"])
def test_a_garbled_heartbeat_is_not_believed(content, tmp_path):
    run = recorded(tmp_path / "run", 1)
    (tmp_path / "run" / files.END).unlink()
    (tmp_path / "run" / files.HEARTBEAT).write_text(content)
    assert run.status == "running"  # it was created a moment ago
    assert run.last_seen == run.created


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


# Trouble while recording


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, monkeypatch, caplog, hasty):
    seals = []

    def refuse(*arguments):
        seals.append(1)
        raise OSError(28, "No space left on device")

    sound = writer_module.write_shard
    monkeypatch.setattr(writer_module, "write_shard", refuse)
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer, 3)
        wait_for(lambda: len(seals) >= 3)
        assert not shards(tmp_path / "run")
        monkeypatch.setattr(writer_module, "write_shard", sound)
        train(model, optimizer, 2, start=3)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3, 4]
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        "could not seal a shard" in message and "No space left" in message and "Training goes on" in message
    )


def test_a_disk_that_stays_full_still_lets_training_end(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        monkeypatch.setattr(writer_module, "write_shard", refuse)
        monkeypatch.setattr(files, "write_json", refuse)
        train(model, optimizer, 3)
    assert {"seal a shard", "mark the end of the run"} <= {record.args[0] for record in caplog.records}
    assert probes.open_run(tmp_path / "run").metrics == []


def test_a_writer_that_cannot_keep_up_drops_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_QUEUE", 2)
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        slow = recorder._writer._take
        monkeypatch.setattr(recorder._writer, "_take", lambda fetch: (time.sleep(0.5), slow(fetch)))
        started = time.monotonic()
        train(model, optimizer, 20)
        assert time.monotonic() - started < 5
    end = json.loads((tmp_path / "run" / files.END).read_text())
    run = probes.open_run(tmp_path / "run")
    assert end["dropped"] > 0
    # A hand-over is a step, but the last one, at closing, has no step in it.
    assert 20 <= end["dropped"] + len(run.steps("hidden_rms")) <= 21
    assert run.status == "finished"


def test_numbers_that_cannot_be_fetched_cost_one_step_only(tmp_path, monkeypatch, caplog):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer, 1)

        def broken(values):
            def fetch():
                raise RuntimeError("device lost")

            return fetch

        with monkeypatch.context() as patch:
            patch.setattr("probes.recorder.start_copy", broken)
            train(model, optimizer, 1, start=1)
        train(model, optimizer, 1, start=2)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 2]
    assert "device lost" in caplog.text
