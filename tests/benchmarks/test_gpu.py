"""One command for all that wants a GPU: it goes on where it stopped, tells what failed, and brings back what counts.

How parts follow each other is tried with small ones; what they do, in the long test, with the real ones, tiny, on the CPU.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import probes
from benchmarks import gpu, packing
from benchmarks.parts import Part, parts

ROOT = Path(__file__).resolve().parents[2]
WRITES = (
    "import sys, pathlib; path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True); "
)


def writing(folder, name, more="", **about):
    """A part that adds a line to a table of its name."""
    code = WRITES + f"path.open('a').write('a line\\n'); {more}"
    return Part(name, ("-c", code, str(folder / "results" / f"{name}.md")), about.pop("seconds", 1), **about)


@pytest.fixture
def work(tmp_path, monkeypatch, capsys):
    """`gpu.main` with these parts, on the CPU: its exit code and what it printed."""

    def run(every, *more):
        monkeypatch.setattr(gpu, "parts", lambda *_: every)
        code = gpu.main(["--out", str(tmp_path), "--device", "cpu", *more])
        return code, capsys.readouterr().out

    return run


def test_what_failed_is_told_and_stops_nothing_else(work, tmp_path):
    every = [
        writing(tmp_path, "first", "sys.exit('out of luck')"),
        writing(tmp_path, "second"),
        writing(tmp_path, "third", after="first"),
        writing(tmp_path, "fourth", needs=("torch", "no_such_package|nor_this")),
        writing(tmp_path, "fifth", needs=("no_such_package|torch",), alone=True),
    ]
    code, told = work(every)
    assert code == 1 and "2 of 5 parts are there" in told
    assert "failed (again with --retry): first: out of luck" in told
    assert "left out: third, for first failed" in told
    assert "left out: fourth, for it needs no_such_package or nor_this" in told
    code, told = work(every)  # what is done, or failed, is not done again
    assert "begun" not in told and (tmp_path / "results" / "second.md").read_text() == "a line\n"
    every[0] = writing(tmp_path, "first")
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    code, told = work(every, "--retry")
    assert "first: done" in told and "third: done" in told


def test_what_would_not_be_done_in_time_waits(work, tmp_path):
    slow = "import time; time.sleep(60)"
    every = [
        writing(tmp_path, "too long", seconds=100),
        writing(tmp_path, "slower than said", slow),
        writing(tmp_path, "short"),
    ]
    code, told = work(every, "--minutes", str((gpu.PACKING + 2) / 60))
    assert code == 1 and "too long: begun" not in told and "short: done" in told
    assert "slower than said: stopped after" in told
    assert "left: too long, slower than said; about 2 minutes. Give the command again." in told
    every[1] = writing(tmp_path, "slower than said")
    code, told = work(every)
    assert code == 0 and "All is there" in told and "short: begun" not in told


def test_times_are_taken_alone(work, tmp_path):
    """Parts that may lie side by side do, and one that is measured has the machine for itself."""
    moment = "import time; time.sleep(0.5); pathlib.Path(sys.argv[1]).with_suffix('.end').write_text(str(time.time()))"
    begin = "pathlib.Path(sys.argv[1]).with_suffix('.begin').write_text(str(__import__('time').time())); "
    every = [
        writing(tmp_path, name, begin + moment, alone=name.startswith("alone"))
        for name in ("one", "two", "alone one", "alone two")
    ]
    code, _ = work(every)
    assert code == 0

    def at(name, what):
        return float((tmp_path / "results" / f"{name}.{what}").read_text())

    assert at("two", "begin") < at("one", "end")
    assert at("alone one", "begin") > max(at("one", "end"), at("two", "end"))
    assert at("alone two", "begin") > at("alone one", "end")


def test_what_comes_back_goes_where_it_belongs(work, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "prenorm"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "checkpoints" / "000000000200.safetensors").write_bytes(b"large")
    work([writing(tmp_path, "table")])
    places = {"runs": tmp_path / "sample_runs", "results": tmp_path / "benchmarks"}
    monkeypatch.setattr(packing, "PLACES", places)
    (tmp_path / "sample_runs" / "prenorm").mkdir(parents=True)
    (tmp_path / "sample_runs" / "prenorm" / "old").write_text("")
    assert gpu.main(["--place", str(tmp_path / "gpu.zip")]) == 0
    assert [path.name for path in (tmp_path / "sample_runs" / "prenorm").iterdir()] == ["run.json"]
    assert (tmp_path / "benchmarks" / "table.md").read_text() == "a line\n"
    assert "Now: python sample_runs/check.py" in capsys.readouterr().out


def test_another_machine_goes_on_from_what_was_packed(work, tmp_path):
    every = [writing(tmp_path, "table")]
    work(every)
    packed = (tmp_path / "gpu.zip").rename(tmp_path / "elsewhere.zip")
    for path in [*(tmp_path / "done").iterdir(), *(tmp_path / "results").iterdir()]:
        path.unlink()
    code, told = work(every, "--from", str(packed))
    assert code == 0 and "begun" not in told and (tmp_path / "results" / "table.md").exists()
    with zipfile.ZipFile(tmp_path / "strange.zip", "w") as archive:
        archive.writestr("runs/../../outside", "")
    with pytest.raises(SystemExit, match="which is none of ours: nothing was taken from it"):
        work(every, "--from", str(tmp_path / "strange.zip"))


def test_every_command_is_one_that_its_program_takes():
    """A wrong word would be found on a GPU, minutes into its time."""
    from app.cli import main as command_line
    from benchmarks import attnres, mixing, overhead  # noqa: F401
    from sample_runs import record
    from sample_runs.plans import plans

    every = parts(Path("somewhere"), "cuda")
    assert len({part.name for part in every}) == len(every)
    recorded = {part.words[part.words.index("--only") + 1] for part in every if "--only" in part.words}
    assert recorded == {plan.name for plan in plans("cuda")}
    for part in every:
        program, words = part.words[:2], list(part.words[2:])
        if program[0] != "-m":
            sys.argv, before = [program[0], program[1], *words], sys.argv
            try:
                record.parsed()
            finally:
                sys.argv = before
        elif program[1] == "app.cli":
            attribute = command_line.commands[words[0]]
            with pytest.raises(Exception, match="somewhere"):
                attribute.main(words[1:], standalone_mode=False)
        elif program[1] in ("benchmarks.attnres", "benchmarks.overhead"):
            sys.modules[program[1]].parsed(words)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_part_runs_where_only_torch_and_a_few_are_installed(tmp_path):
    """No Streamlit, no Altair, no captum, as on a machine that is there to train."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "absent = {'streamlit', 'altair', 'vl_convert', 'captum', 'hypothesis', 'pytest', 'attn_res', 'fla', 'liger_kernel'}\n"
        "find = PathFinder.find_spec.__func__\n"
        "def find_spec(cls, name, path=None, target=None):\n"
        "    return None if name.split('.')[0] in absent else find(cls, name, path, target)\n"
        "PathFinder.find_spec = classmethod(find_spec)\n"
    )
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--smoke",
        "--device",
        "cpu",
        "--at-once",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "FAILED" not in done.stdout and "left:" not in done.stdout, done.stdout + done.stderr
    assert "left out: attnres, fused kernels, width 1024, for it needs fla or liger_kernel" in done.stdout
    with zipfile.ZipFile(out / "smoke" / "gpu.zip") as archive:
        archive.extractall(tmp_path / "back")
    with pytest.raises(SystemExit, match="is of a smoke run"):
        gpu.main(["--place", str(out / "smoke" / "gpu.zip")])
    back = tmp_path / "back"
    assert {path.name for path in (back / "runs").iterdir()} == {"full", "unhealthy", "kimi-block"}
    full = probes.open_run(back / "runs" / "full")
    assert full.status == "finished" and len(full.attributions()) == 1
    assert full.config["sample"]["composition"]
    tables = json.loads((back / "results" / "attnres-cpu.json").read_text())
    assert all(each["table"] and each["profile"] for each in tables.values())
    assert {"overhead-cpu-eager.json", "overhead-cpu-eager.md", "mixing-cpu.md"} <= {
        path.name for path in (back / "results").iterdir()
    }
