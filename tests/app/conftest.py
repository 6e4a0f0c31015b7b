"""Folders of made runs, written once."""

import shutil
from pathlib import Path

import pytest

from probes.manifest import RANK_FOLDER
from tests.app import made


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
