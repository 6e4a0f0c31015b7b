"""Reading needs no torch, and nobody imports across the fences."""

import subprocess
import sys
from pathlib import Path

import pytest

import probes
from tests.probes.models import decoder, sgd, train

ROOT = Path(__file__).parents[2]

READ = """
import sys
import probes
(run,) = probes.list_runs(sys.argv[1])
run = probes.open_run(run.path)
assert run.status == "finished" and run["depth_weight"].shape == (1, 7, 7) and run.layers[0].index == 1
"""
CHECK = "\nheavy = {'torch', 'pandas', 'altair', 'streamlit', 'attnres', 'app'} & set(sys.modules)\n"
CHECK += "assert not heavy, f'imported: {sorted(heavy)}'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model = decoder("full")
    optimizer = sgd(model)
    with probes.record(model, folder / "run", optimizer=optimizer):
        train(model, optimizer, 1)
    return folder


def in_a_clean_interpreter(code: str, runs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_reading_a_run_imports_no_torch(runs):
    done = in_a_clean_interpreter(READ + CHECK, runs)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("statement", ["probes.record", "from probes import taps"])
def test_that_check_can_fail(statement, runs):
    done = in_a_clean_interpreter(READ + statement + CHECK, runs)
    assert done.returncode == 1 and "imported: ['torch']" in done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'surprise'"):
        probes.surprise  # noqa: B018


def test_import_contracts_hold():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
