"""Folders of made runs, written once."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from probes import open_run
from probes.manifest import RANK_FOLDER, Manifest
from probes.writer import RunWriter
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


@pytest.fixture(scope="session")
def recovered(tmp_path_factory) -> Path:
    """Really trained and recorded: PreNorm, Full and Block of 4 layers, with what was recovered of their mixing."""
    import torch

    import probes
    from attnres.decoder import Decoder, DecoderConfig

    root = tmp_path_factory.mktemp("recovered")
    for residual, more in (("prenorm", {}), ("full", {}), ("block", {"layers_per_block": 2})):
        torch.manual_seed(0)
        model = Decoder(
            DecoderConfig(width=32, heads=2, kv_heads=1, blocks=2, context=16, residual=residual, **more)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        told = {"residual": residual, **more}
        with probes.record(
            model, root / residual, optimizer=optimizer, every=2, matrices_every=4, config=told
        ) as kept:
            for _ in range(13):
                text = torch.randint(0, 256, (2, 17))
                loss = torch.nn.functional.cross_entropy(
                    model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()
                )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                kept.log(loss=loss.item())
    return root


@pytest.fixture
def tiny(tmp_path):
    """Two transformer blocks of Full AttnRes; every number is chosen by hand."""
    shape = made.layout("full", 2)
    writer = RunWriter(tmp_path / "tiny", Manifest(shape, 0.0, 10, 20))
    weight = np.tril(np.ones((5, 5)))
    weight /= weight.sum(axis=1, keepdims=True)
    later = weight.copy()
    later[3] = [0.1, 0.6, 0.1, 0.2, 0]
    rows = [
        ("hidden_rms", 0, np.array([1, 2, 3, 4, 5])),
        ("hidden_rms", 10, np.array([1, 2, 4, 8, np.inf])),
        ("output_grad_rms", 0, np.array([100, 1, 2, 3, 4])),
        ("depth_weight", 0, shape.pack(weight)),
        ("depth_weight", 20, shape.pack(later)),
        ("contribution_rms", 20, shape.pack(2 * later)),
        *(("loss", step, np.float32(10 - step)) for step in range(5)),
    ]
    writer.put(lambda: rows, 20)
    writer.close("finished")
    return open_run(tmp_path / "tiny")
