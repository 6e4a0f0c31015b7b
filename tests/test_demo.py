"""The demo as a user runs it: a process of its own, on real text."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import probes
from tests.recompute import compare

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


def depthscope(*arguments: object, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "app", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=240, env=environment(**more)
    )


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory) -> dict[str, probes.Run]:
    folder = tmp_path_factory.mktemp("demo") / "runs"
    done = depthscope("demo", "--no-serve", "--runs", folder, "--steps", STEPS, "--checkpoint-every", STEPS)
    assert done.returncode == 0, done.stderr
    assert "loss: PreNorm" in done.stderr and "Full AttnRes" in done.stderr
    return {run.name: run for run in probes.list_runs(folder)}


def test_demo_records_three_finished_runs(demo_runs):
    assert sorted(demo_runs) == ["block", "full", "prenorm"]
    for run in demo_runs.values():
        assert run.status == "finished"
        assert list(run.steps("hidden_rms")) == list(range(STEPS))
        assert list(run.steps("loss")) == list(range(STEPS))
        assert list(run.steps("val_loss")) == [0, STEPS - 1]
        assert len(run.layers) == 24
    sizes = {run.manifest.versions["parameters"] for run in demo_runs.values()}
    assert max(sizes) / min(sizes) < 1.01
    assert len(demo_runs["block"].sources) == 9


@pytest.mark.parametrize("name", ["prenorm", "full", "block"])
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_shown_numbers_are_the_models_numbers(demo_runs, name, step):
    # Matrices are recorded at every fifth step, so step 5 has them too.
    differences = compare(demo_runs[name], step)
    assert len(differences) >= 6
    assert max(differences.values()) < 1e-4, differences


def test_what_the_demo_saved_can_be_attributed(demo_runs):
    run = demo_runs["block"]
    done = depthscope("attribute", run.path, "--sequences", 1, "--context", 16, "--methods", "gradient")
    assert done.returncode == 0, done.stderr
    (found,) = run.attributions()
    assert found.step == STEPS and found.about.data.startswith("validation part of Python")
    assert "the loss is" in done.stdout


def test_recomputation_can_fail(demo_runs, tmp_path):
    """A number in the run that is not the model's is found."""
    run = demo_runs["full"]
    changed = run["output_rms"].copy()
    changed[0, 3] *= 1.01
    run._whole["output_rms"] = changed
    assert compare(run, 0)["output_rms"] > 5e-3


def test_demo_refuses_a_folder_that_holds_runs(demo_runs):
    folder = demo_runs["full"].path.parent
    done = depthscope("demo", "--no-serve", "--runs", folder, "--steps", 2)
    assert done.returncode == 1
    assert "already holds a run" in done.stderr and "Traceback" not in done.stderr


def test_demo_learns_what_it_is_given_and_says_what_it_cannot_read(tmp_path):
    done = depthscope("demo", "--no-serve", "--runs", tmp_path / "r", "--text", tmp_path / "nothing")
    assert done.returncode == 1
    assert "no file or folder" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_text_too_small_is_refused_before_anything_is_recorded(tmp_path):
    (tmp_path / "tiny.txt").write_text("hello")
    done = depthscope("demo", "--no-serve", "--runs", tmp_path / "r", "--text", tmp_path / "tiny.txt")
    assert done.returncode == 1
    assert "too small" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for serve in ("--serve", "--no-serve"):
        done = depthscope("demo", serve, "--port", free_port(), "--runs", tmp_path / "file", "--steps", 1)
        assert done.returncode == 1
        assert "cannot be recorded" in done.stderr and "Traceback" not in done.stderr


def test_version_in_a_checkout():
    done = depthscope("--version")
    assert done.returncode == 0 and "depthscope" in done.stdout


def test_demo_says_that_the_port_is_busy(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        done = depthscope("demo", "--port", busy.getsockname()[1], "--runs", tmp_path / "r")
    assert done.returncode == 1
    assert "in use" in done.stderr and "--port" in done.stderr
    assert not (tmp_path / "r").exists()


def test_another_package_called_attnres_is_named(tmp_path):
    """fast-attnres installs a top-level attnres too; where it comes first, one sentence says so."""
    for package in ("app", "probes"):
        copy_package(package, tmp_path)
    (tmp_path / "attnres").mkdir()
    (tmp_path / "attnres" / "__init__.py").write_text("")
    done = depthscope("demo", "--no-serve", "--runs", tmp_path / "r", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "is not depthscope's" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def growing(tmp_path):
    """`depthscope demo` in a checkout without sample_runs/: its process, folder of runs and address."""
    for package in ("app", "probes", "attnres"):
        copy_package(package, tmp_path)
    port, folder = free_port(), tmp_path / "runs"
    command = [
        sys.executable,
        "-m",
        "app",
        "demo",
        "--runs",
        str(folder),
        "--port",
        str(port),
        "--no-browser",
    ]
    demo = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: list(folder.glob("*/rank-00000/*.safetensors")), 120)
        yield demo, folder, f"http://127.0.0.1:{port}"
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)


@pytest.mark.browser
def test_demo_shows_three_growing_runs_within_a_minute(growing, watched):
    _, folder, address = growing
    watched.goto(address, timeout=60_000)
    for name in ("prenorm", "full", "block"):
        watched.wait_for_selector(f"text=/{name}.*running|{name}.*live/", timeout=60_000)
    watched.wait_for_selector('[data-testid="stVegaLiteChart"] :is(canvas, svg)', timeout=60_000)
    steps = [run.last_step for run in probes.list_runs(folder)]
    wait_for(
        lambda: all(run.last_step > step for run, step in zip(probes.list_runs(folder), steps, strict=True)),
        60,
    )
    watched.wait_for_selector("text=/1.25/")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process group")
def test_ctrl_c_ends_everything_and_says_how_to_come_back(growing):
    demo, folder, address = growing
    wait_for(lambda: len(list(folder.glob("*/rank-00000/0*.safetensors"))) >= 3, 120)
    with urllib.request.urlopen(f"{address}/_stcore/health", timeout=20) as answer:
        assert answer.status == 200
    os.killpg(demo.pid, signal.SIGINT)  # what a terminal does
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 0
    assert f"depthscope dash {folder}" in said and "Traceback" not in said
    runs = list(probes.list_runs(folder))
    assert [run.status for run in runs] == ["stopped"] * 3
    assert all("KeyboardInterrupt" in run.status_reason for run in runs)
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=5)


def copy_package(name: str, to: Path) -> None:
    shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@pytest.mark.parametrize("document", ["README.md", "docs/*.md", "sample_runs/*.md"])
def test_links_and_images_of_the_docs_exist(document):
    for path in ROOT.glob(document):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path} points to {target}, which is not there"


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", readme, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), (
            f"make {target} is in the README and not in the Makefile"
        )
