"""Who makes digests, when, and that it harms nobody: a writer behind its back, a command, several at once, killed ones."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import probes
from app.cli import main
from probes import checking, compacting, digest
from probes import manifest as files
from probes.digest import FOLDER
from probes.manifest import Manifest
from probes.run import Run
from probes.writer import RunWriter
from tests.probes.digested import LAYOUT, compacted, same, seal, values
from tests.probes.models import wait_for

KILLED = """
import sys
from pathlib import Path
from probes import compacting
from probes.digest import FOLDER
from probes.run import Run
compacting.ROWS = 50
run = Run(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for attempt in run.attempts:
        into = attempt.shards / FOLDER
        for path in compacting.compact(attempt, run.layout, into):
            pass
        for path in into.glob("0*"):
            path.unlink(missing_ok=True)
"""


def test_a_compaction_that_is_killed_does_no_harm(digestible):
    wanted = values(Run(digestible))
    child = [sys.executable, "-c", KILLED, str(digestible)]
    for moment in (0.0, 0.013, 0.031):
        with subprocess.Popen(child, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        same(Run(digestible), wanted)
        assert CliRunner().invoke(main, ["check", str(digestible)]).exit_code == 0
    compacted(digestible)
    same(Run(digestible), wanted)


def test_several_compactors_at_once_do_no_harm(digestible):
    """Two that make and remove the same files all the time, and a command that makes them too, while somebody reads."""
    wanted = values(Run(digestible))
    child = [sys.executable, "-c", KILLED, str(digestible)]
    root = Path(__file__).parents[2]
    with (
        subprocess.Popen(child, stdout=subprocess.PIPE, cwd=root) as one,
        subprocess.Popen(child, stdout=subprocess.PIPE, cwd=root) as other,
    ):
        try:
            assert one.stdout.readline() == other.stdout.readline() == b"ready\n"
            for _ in range(8):
                found = Run(digestible)
                CliRunner().invoke(main, ["compact", str(digestible)])  # what it made may be gone already
                same(found, wanted)
            assert one.poll() is None and other.poll() is None, "neither of them failed"
        finally:
            one.kill()
            other.kill()
    assert CliRunner().invoke(main, ["compact", str(digestible)]).exit_code == 0
    assert CliRunner().invoke(main, ["check", str(digestible)]).exit_code == 0
    same(Run(digestible), wanted)


def test_what_a_killed_compactor_left_is_removed_when_it_is_nobodys(digestible):
    compacted(digestible)
    folder = digestible / files.RANK_FOLDER / FOLDER
    new, old = folder / ".a.safetensors.tmp-1-ab", folder / ".b.safetensors.tmp-2-cd"
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert "nothing to do" in CliRunner().invoke(main, ["compact", str(digestible)]).output
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("version", ["0", "2"])
def test_a_digest_of_another_version_is_said_and_made_anew(digestible, version, monkeypatch):
    wanted = values(Run(digestible))
    with monkeypatch.context() as patch:
        patch.setattr(digest, "VERSION", version)
        made = compacted(digestible)
    found = Run(digestible)
    same(found, wanted)
    assert not any(attempt.digests for attempt in found.attempts)
    assert len(found.problems) == 2 and "is of another depthscope" in found.problems[0]
    assert "the shards are read instead" in found.problems[0]
    done = CliRunner().invoke(main, ["compact", str(digestible)])
    assert done.exit_code == 0 and f"{made} that did not fit deleted" in done.output
    found.refresh()  # somebody who looked on hears of it
    assert not found.problems and all(attempt.digests for attempt in found.attempts)
    same(found, wanted)


def test_nothing_is_compacted_through_a_link(digestible, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (digestible / files.RANK_FOLDER / FOLDER).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    done = CliRunner().invoke(main, ["compact", str(digestible)])
    assert done.exit_code == 1 and "has no digest: File exists" in done.output
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Who makes it


def test_a_writer_makes_its_own_and_a_reader_that_looks_on_lets_go_of_the_rows(tmp_path, monkeypatch, few):
    monkeypatch.setattr("probes.writer.SEAL_SECONDS", 0.0)
    writer = RunWriter(tmp_path / "run", Manifest(LAYOUT, time.time(), 1, 1))

    def put(steps) -> None:
        for step in steps:
            writer.put(lambda step=step: [("hidden_rms", step, np.full(5, step, np.float32))], step)
            while writer._queue.qsize() > 100:
                time.sleep(0.001)

    put(range(40))
    while not list((tmp_path / "run" / files.RANK_FOLDER).glob("*.safetensors")):
        time.sleep(0.01)
    found = Run(tmp_path / "run")
    put(range(40, 200))
    # Somebody else does the same meanwhile, and leaves what fills no file to the writer.
    assert CliRunner().invoke(main, ["compact", str(tmp_path / "run")]).exit_code == 0
    put(range(200, 300))
    folder = tmp_path / "run" / files.RANK_FOLDER / FOLDER
    deadline = time.monotonic() + 30
    while not (folder.is_dir() and len(list(folder.iterdir()))) and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.close("finished")
    found.refresh()
    (attempt,) = found.attempts
    assert attempt.digests
    covered = sum(digest.metrics["hidden_rms"].rows for digest in attempt.digests)
    assert covered >= 100 and attempt.held < 300 * 28
    np.testing.assert_array_equal(found["hidden_rms"][:, 0], np.arange(300))
    assert CliRunner().invoke(main, ["check", str(tmp_path / "run")]).exit_code == 0


def test_a_digest_made_during_a_check_is_no_defect(digestible, monkeypatch):
    """Of shards that were sealed after those were listed which are checked."""
    look = checking.token_steps

    def meanwhile(folder):
        monkeypatch.setattr(checking, "token_steps", look)
        seal(digestible / files.RANK_FOLDER, range(270, 400), 9)
        assert compacted(digestible) > 0
        return look(folder)

    monkeypatch.setattr(checking, "token_steps", meanwhile)
    assert not checking.check(digestible).defects
    assert list((digestible / files.RANK_FOLDER / FOLDER).glob("*-000000000399.safetensors"))
    assert not checking.check(digestible).defects


def test_a_disk_that_refuses_a_digest_is_no_matter(tmp_path, monkeypatch, few):
    writer = RunWriter(tmp_path / "run", Manifest(LAYOUT, time.time(), 1, 1))
    (tmp_path / "run" / files.RANK_FOLDER / FOLDER).write_text("in the way")
    rows = [("loss", step, np.float32(step)) for step in range(200)]
    writer.put(lambda: rows, 200)
    writer.close("finished")
    found = probes.open_run(tmp_path / "run")
    assert found.status == "finished" and found["loss"].tolist() == list(range(200))


def busy(monkeypatch, meanwhile) -> list[str]:
    """What is read for a digest, while before each shard `meanwhile` happens."""
    sound, seen = compacting._read, []

    def read(attempt, layout, name):
        seen.append(name)
        meanwhile(len(seen))
        return sound(attempt, layout, name)

    monkeypatch.setattr(compacting, "_read", read)
    return seen


def rows(step: int):
    return lambda: [("hidden_rms", step, np.full(5, step, np.float32))]


def test_a_writer_at_work_on_a_digest_drops_nothing(tmp_path, monkeypatch, few, hasty):
    """More is handed over meanwhile than the queue holds."""
    writer = RunWriter(tmp_path / "run", Manifest(LAYOUT, time.time(), 1, 1))
    at = 0

    def put(count: int) -> None:
        nonlocal at
        for at in range(at + 1, at + 1 + count):  # noqa: B020
            assert writer.put(rows(at), at)

    seen = busy(monkeypatch, lambda number: put(100) if number <= 8 else None)
    put(40)
    wait_for(lambda: list((tmp_path / "run" / files.RANK_FOLDER).glob("*.safetensors")))
    while not seen:
        if writer._queue.qsize() < 50:
            put(40)
        time.sleep(0.01)
    wait_for(lambda: len(seen) > 8)
    writer.close("finished")
    found = Run(tmp_path / "run")
    assert writer.dropped == 0 and not found.problems and found.attempts[0].digests
    assert found["hidden_rms"][:, 0].tolist() == list(range(1, at + 1))


def test_the_end_of_a_recording_does_not_wait_for_a_digest(tmp_path, monkeypatch, few, hasty):
    path, ended = tmp_path / "run", []
    writer = RunWriter(path, Manifest(LAYOUT, time.time(), 1, 1))
    sound = compacting.write_digest
    monkeypatch.setattr(
        compacting, "write_digest", lambda *given: (ended.append((path / files.END).exists()), sound(*given))
    )
    all_put = threading.Event()

    def ends(number: int) -> None:
        if number == 1:
            assert all_put.wait(20)
            writer._queue.put(None)  # as `close` does

    seen = busy(monkeypatch, ends)
    for step in range(120):
        assert writer.put(rows(step), step)
        time.sleep(0.001)
    all_put.set()
    wait_for(lambda: seen)
    writer.close("finished")
    found = Run(path)
    assert ended and all(ended), "the run was whole and ended before its digest was written"
    assert found.attempts[0].digests and len(found["hidden_rms"]) == 120


def test_a_disk_with_little_room_is_left_to_the_shards(tmp_path, monkeypatch, few):
    monkeypatch.setattr(compacting, "_ROOM", 1 << 62)
    writer = RunWriter(tmp_path / "run", Manifest(LAYOUT, time.time(), 1, 1))
    writer.put(lambda: [row for step in range(200) for row in rows(step)()], 200)
    writer.close("finished")
    assert not (tmp_path / "run" / files.RANK_FOLDER / FOLDER).exists()
    assert len(Run(tmp_path / "run")["hidden_rms"]) == 200
