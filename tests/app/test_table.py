"""The table of runs tells what a full reading would, from a glance; ticks, settings and colours follow the choice."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from app import glance, opener, settings, table
from app.charts import palette
from benchmarks import long_run
from probes import open_run
from probes.manifest import HEARTBEAT, RANK_FOLDER, Manifest
from probes.shard import read_shard
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import opened, said


@pytest.mark.parametrize("name", ["full", "few steps", "nothing yet", "missing metrics"])
def test_a_glance_says_what_the_whole_run_does(folders, name):
    (entry,) = opener.find([folders[name]])
    run, now = open_run(entry.path), opener.glanced(entry)
    assert (now.status, now.reason, now.last_step) == (run.status, run.status_reason, run.last_step)
    assert now.loss == (float(run["loss"][-1]) if "loss" in run else None)
    assert now.size == run.size and now.since == run.last_seen.timestamp()


def test_a_glance_reads_a_shard_once_and_follows_a_growing_run(tmp_path, monkeypatch):
    made.run(tmp_path / "run", steps=2)
    reads = []
    monkeypatch.setattr(glance, "read_shard", lambda path: reads.append(path) or read_shard(path))
    (entry,) = opener.find([tmp_path])
    assert [opener.glanced(entry).last_step for _ in range(3)] == [10, 10, 10]
    assert len(reads) == 1
    shard = next((tmp_path / "run" / RANK_FOLDER).iterdir())
    shard.with_name("000000000020-000000000030.safetensors").write_bytes(shard.read_bytes())
    assert opener.glanced(entry).last_step == 30 and len(reads) == 2


def test_a_broken_newest_shard_leaves_the_loss_of_the_one_before(folders):
    (entry,) = opener.find([folders["broken shard"]])
    assert opener.glanced(entry).loss == float(open_run(entry.path)["loss"][-1])


def test_a_killed_run_says_since_when(tmp_path):
    writer = RunWriter(tmp_path / "killed", made.manifest("full"))
    rows = [("loss", 0, np.float32(3))]
    writer.put(lambda: rows, 0)
    writer.close("finished")
    os.remove(tmp_path / "killed" / "end.json")
    hour_ago = time.time() - 3600
    (tmp_path / "killed" / HEARTBEAT).write_text(json.dumps({"time": hour_ago, "pid": 1, "step": 0}))
    (row,) = table.rows(opener.find([tmp_path])).to_dict("records")
    assert row["Status"] == "stopped" and row["Why"].startswith("No sign of life since")
    assert row["Ended"].timestamp() == pytest.approx(hour_ago)


def test_the_table_tells_what_differs(tmp_path):
    for i, rate in enumerate((1e-3, 2e-3)):
        made.run(tmp_path / str(i), steps=1, created=1.0 + i, training={"lr": rate, "batch": 4})
    frame = table.rows(opener.find([tmp_path]))
    assert frame["Configuration"].tolist() == ["training.lr 0.001", "training.lr 0.002"]


def test_settings_are_flat_and_only_differences_are_told():
    first, second = {"a": 1, "in": {"b": 2, "c": 3}}, {"a": 1, "in": {"b": 4}}
    assert settings.together([first, second]) == {"in.b": ["2", "4"], "in.c": ["3", "–"]}
    assert list(settings.together([first, second], only_differing=False)) == ["a", "in.b", "in.c"]


def test_the_page_shows_settings(folder):
    at = opened(folder, runs=["full", "block"])
    assert at.dataframe[1].value.loc["layers_per_block"].tolist() == ["–", "6"]
    at.button_group(key="pick settings").set_value("all").run()
    assert "width" in at.dataframe[1].value.index


def test_the_chosen_runs_are_ticked(folder):
    at = opened(folder, runs=["full"])
    names = at.dataframe[0].value["Run"].tolist()
    assert at.session_state["runs table"]["selection"]["rows"] == [names.index("full")]
    at.multiselect(key="pick runs").set_value(["full", "prenorm"]).run()
    ticked = at.session_state["runs table"]["selection"]["rows"]
    assert [names[row] for row in ticked] == ["full", "prenorm"]


def test_a_run_keeps_its_colour_whatever_else_is_chosen():
    everyone = [f"run {i}" for i in range(20)]
    first = palette.assign(everyone, ["run 7", "run 0"])
    assert first["run 7"] != first["run 0"]
    for chosen in (["run 0", "run 7"], ["run 0"], ["run 14", "run 0", "run 7"]):
        now = palette.assign(everyone, chosen, first)
        assert all(now[run] == first[run] for run in chosen if run in first)
        assert len(set(now.values())) == len(chosen)


def test_a_manifest_is_read_again_when_another_run_takes_the_place(tmp_path):
    made.run(tmp_path / "run", "full", steps=1)
    assert opener.find([tmp_path])[0].residual == "full"
    told = Manifest.read(tmp_path / "run").to_json()
    (tmp_path / "run" / "run.json").write_text(json.dumps(told | {"config": {"residual": "block"}}))
    assert opener.find([tmp_path])[0].residual == "block"


def test_a_resumed_run_is_glanced_at_as_it_is_read(tmp_path):
    told = made.manifest("full", 2)
    for begun, last in ((0, 40), (30, 60)):
        writer = RunWriter(tmp_path / "run", replace(told, step=begun), resume=begun > 0)
        rows = [("loss", step, np.float32(begun + step)) for step in range(begun, last, 10)]
        writer.put(lambda rows=rows: rows, last)
        writer.close("stopped" if begun == 0 else "finished", "preempted")
    (entry,) = opener.find([tmp_path])
    run, now = open_run(entry.path), opener.glanced(entry)
    assert (now.status, now.last_step, now.loss) == ("finished", run.last_step, float(run["loss"][-1]))
    assert now.size == run.size
    assert "Continued from step 30." in said(opened(tmp_path))


def test_a_glance_keeps_little_of_a_long_run(tmp_path, monkeypatch):
    """What is kept is kept by names of shards: of all of them, it would grow with the square of a run's length."""
    long_run.make(tmp_path / "run", 300, 4, rows=10)
    keys, sound = [], glance._loss
    monkeypatch.setattr(glance, "_loss", lambda *key: keys.append(key) or sound(*key))
    (entry,) = opener.find([tmp_path])
    assert opener.glanced(entry).last_step == 299
    assert [len(shards) for _, shards, _ in keys] == [8]
