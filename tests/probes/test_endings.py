"""How a run ends, and what its folder says of it afterwards."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

import probes
from probes import manifest as files
from tests.probes.models import decoder

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
train(model, optimizer, 1, start=2)  # and then a normal exit
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


ENDS = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from probes.ending import Ending

def close(status, reason):
    ending.release()
    try:
        print(ThreadPoolExecutor(1).submit(lambda: status).result())
    except RuntimeError as error:
        print(error)

pool = ThreadPoolExecutor(1)
pool.submit(int).result()
ending = Ending(close, early=sys.argv[1] != "late")
if sys.argv[1] == "thread":
    threading.Thread(target=lambda: (time.sleep(0.5), print("trained"))).start()
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("early", ["finished"]),
        ("late", ["cannot schedule new futures after shutdown"]),
        ("thread", ["trained", "cannot schedule new futures after shutdown"]),  # what trains comes first
    ],
)
def test_what_is_sent_at_the_end_is_sent_while_there_are_thread_pools(how, said):
    done = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.replace("interpreter ", "") for line in done.stdout.splitlines()] == said
