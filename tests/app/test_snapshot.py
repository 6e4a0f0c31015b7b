"""What a page shows is of one moment, while the run grows under it."""

import threading

import numpy as np

from app.snapshot import Followed
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made


def seal(writer: RunWriter, step: int) -> None:
    """Hand over one step, and wait until it is on disk."""
    rows = [("hidden_rms", step, np.full(5, step, np.float32)), ("loss", step, np.float32(step))]
    writer.put(lambda: rows, step)
    folder = writer.path / "rank-00000"
    while not any(int(shard.stem[-12:]) >= step for shard in folder.glob("*.safetensors")):
        threading.Event().wait(0.02)


def test_a_snapshot_stays_and_the_next_look_sees_more(tmp_path, monkeypatch):
    monkeypatch.setattr("probes.writer.SEAL_SECONDS", 0.05)
    writer = RunWriter(tmp_path / "run", Manifest(made.layout("full", 2), 0.0, 1, 1))
    seal(writer, 0)
    seal(writer, 1)
    followed = Followed(tmp_path / "run")
    before = followed.look()
    assert followed.look()._whole is before._whole  # nothing new: nothing is put together twice
    seal(writer, 2)
    later = followed.look()
    assert before.steps("loss").max() < 2 <= later.steps("loss").max()
    assert len(before["loss"]) == len(before.steps("loss")) and before.last_step < later.last_step
    assert before.status == "running" and not before.refresh()
    writer.close("finished")
    assert (before.status, followed.look().status) == ("running", "finished")
    assert (before.steps("hidden_rms") == before["hidden_rms"][:, 0]).all()
