"""Who makes digests, when, and that it harms nobody: a writer behind its back, a command, several at once, killed ones."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from click.testing import CliRunner

import probes
from app.cli import main
from probes import manifest as files
from probes.digest import FOLDER
from probes.manifest import Manifest
from probes.run import Run
from probes.writer import RunWriter
from tests.probes.digested import LAYOUT, compacted, same, values

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
        for path in into.iterdir():
            path.unlink()
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
    put(range(40, 300))
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


def test_a_disk_that_refuses_a_digest_is_no_matter(tmp_path, monkeypatch, few):
    writer = RunWriter(tmp_path / "run", Manifest(LAYOUT, time.time(), 1, 1))
    (tmp_path / "run" / files.RANK_FOLDER / FOLDER).write_text("in the way")
    rows = [("loss", step, np.float32(step)) for step in range(200)]
    writer.put(lambda: rows, 200)
    writer.close("finished")
    found = probes.open_run(tmp_path / "run")
    assert found.status == "finished" and found["loss"].tolist() == list(range(200))
