"""Folders of made runs, written once."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from probes.manifest import RANK_FOLDER
from tests.app import made

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three finished runs of 12 layers, one of each residual; steps 0, 10 ... 200, matrices every 20."""
    root = tmp_path_factory.mktemp("runs")
    for i, variant in enumerate(("prenorm", "full", "block")):
        made.run(root / variant, variant, created=1000.0 + i, matrices_every=2)
    return root


@pytest.fixture(scope="session")
def folders(tmp_path_factory, folder) -> dict[str, Path]:
    """The folders every page must open, by what is in them."""
    root = tmp_path_factory.mktemp("folders")
    for variant in ("prenorm", "full", "block"):
        shutil.copytree(folder / variant, root / variant / variant)
    (root / "empty").mkdir()
    lacking = ("hidden_rms", "output_grad_rms", "depth_weight", "depth_entropy", "loss")
    made.run(root / "missing metrics" / "full", "full", steps=3, without=lacking)
    made.run(root / "single step" / "full", "full", steps=1)
    made.run(root / "few steps" / "block", "block", steps=2, status="stopped", reason="KeyboardInterrupt")
    made.run(root / "nothing yet" / "full", "full", steps=0, status="stopped", reason="out of memory")
    shutil.copytree(folder / "full", root / "broken shard" / "full")
    broken = next((root / "broken shard" / "full" / RANK_FOLDER).iterdir())
    broken.with_name("000000000300-000000000310.safetensors").write_bytes(broken.read_bytes()[:-40])
    shutil.copytree(folder, root / "unreadable manifest")
    (root / "unreadable manifest" / "block" / "run.json").write_text("{")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """serve(folder) starts the real command on a free port and returns its address."""
    started = []

    def start(folder: Path) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "app.cli", "dash", str(folder), "--port", str(port), "--no-browser"]
        log = tmp_path_factory.mktemp("server") / "log"
        with log.open("wb") as out:
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1)
                return address
            except (urllib.error.URLError, OSError):
                assert started[-1].poll() is None, log.read_text()
                time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for server in started:
        server.terminate()
        server.wait(20)
