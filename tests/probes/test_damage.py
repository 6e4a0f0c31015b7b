"""Broken files, and trouble with the disk while recording: said once, and it costs little."""

import json
import re
import time

import numpy as np
import pytest

import probes
from probes import manifest as files
from probes import writer as writer_module
from probes.jsonfile import write_json
from probes.lost import Lost
from tests.probes.models import decoder, recorded, sgd, shards, train, wait_for


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A run of two shards, each a few kilobytes."""
    path = tmp_path_factory.mktemp("damage") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SEAL_SECONDS", 0.0)
        model = decoder("full", blocks=1)
        optimizer = sgd(model)
        with probes.record(model, path, optimizer=optimizer, every=1):
            train(model, optimizer, 2)
            wait_for(lambda: len(shards(path)) == 1)
    assert len(shards(path)) == 2
    return path


def damaged(path, content: bytes):
    """The run as it reads with other content in its first shard."""
    first, _ = shards(path)
    sound = first.read_bytes()
    first.unlink()  # a new file: the old one may be mapped into memory
    first.write_bytes(content)
    try:
        return probes.open_run(path)
    finally:
        first.unlink()
        first.write_bytes(sound)


def assert_reported(run, what):
    assert len(run.problems) == 1, what
    assert run.problems[0].startswith(
        "Steps 0 to 0 are missing: shard 000000000000-000000000000.safetensors "
    )
    assert run.steps("hidden_rms").tolist() == [1], what


def test_every_kind_of_truncation_is_reported(two_shards):
    sound = shards(two_shards)[0].read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(sound) - 1):
        assert_reported(damaged(two_shards, sound[:length]), length)
    assert_reported(damaged(two_shards, sound + b"\0"), "a byte more")
    assert_reported(damaged(two_shards, bytes(len(sound))), "zeros")


def test_flipped_bits_are_reported_wherever_they_are(two_shards):
    """The length, the JSON header, the metadata, the numbers: one bit each, at many places."""
    sound = shards(two_shards)[0].read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    generator = np.random.default_rng(0)
    crc = sound.index(b"crc32")
    places = [*range(8), *range(crc - 2, crc + 18)]
    places += (
        generator.integers(8, header, 150).tolist() + generator.integers(header, len(sound), 60).tolist()
    )
    for place in places:
        for bit in (0, 5) if place < 8 else (int(generator.integers(8)),):
            broken = bytearray(sound)
            broken[place] ^= 1 << bit
            assert_reported(damaged(two_shards, bytes(broken)), (place, bit))


def test_files_that_are_no_shards_are_passed_over(two_shards):
    folder = two_shards / files.RANK_FOLDER
    others = [folder / ".000-001.safetensors.tmp-1", folder / "notes.txt", folder / "mine.safetensors"]
    for other in others:
        other.write_bytes(b"half")
    run = probes.open_run(two_shards)
    assert not run.problems and run.steps("hidden_rms").tolist() == [0, 1]
    for other in others:
        other.unlink()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "null", '{"format": 1}', "{}", "\0\0", b"\xff\xfe"]
)
def test_a_garbled_manifest_gets_one_sentence(content, tmp_path):
    path = tmp_path / files.MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(probes.RunError, match=r"cannot be opened: its run\.json is") as caught:
        probes.open_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, value",
    [
        (["layout", "reads", 0, "sources"], 99),
        (["layout", "reads", 0, "sources"], "2"),
        (["layout", "reads", 0, "surprise"], 1),
        (["layout", "reads"], []),
        (["layout", "layers", 0, "block"], None),
        (["layout", "layers"], "none"),
        (["layout", "sources"], [1]),
        (["created"], 1e300),
        (["created"], "today"),
        (["created"], float("nan")),
        (["every"], None),
        (["schedule"], "daily"),
        (["schedule", "vectors"], {"ranges": [[0, 10, 0]]}),
        (["schedule", "matrices"], {"every": 0}),
        (["config"], [1]),
        (["format"], "new"),
    ],
)
def test_a_manifest_with_a_wrong_value_gets_one_sentence(keys, value, two_shards, tmp_path):
    data = json.loads((two_shards / files.MANIFEST).read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / files.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(probes.RunError, match="not a depthscope manifest"):
        probes.open_run(tmp_path)


def test_no_run_and_newer_runs_get_one_sentence(two_shards, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            probes.RunError, match=r"There is no run at .*: it has no run\.json\. Give the folder"
        ):
            probes.open_run(path)
    data = json.loads((two_shards / files.MANIFEST).read_text()) | {"format": 3, "layout": "something new"}
    (tmp_path / files.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(probes.RunError, match=r"format 3, newer than this depthscope reads \(2\): upgrade"):
        probes.open_run(tmp_path)


@pytest.mark.parametrize("content", ['{"time": 1e300}', '{"time": NaN}', '{"time": "x"}', "[]", "{"])
def test_a_garbled_heartbeat_is_not_believed(content, tmp_path):
    run = recorded(tmp_path / "run", 1)
    (tmp_path / "run" / files.END).unlink()
    (tmp_path / "run" / files.HEARTBEAT).write_text(content)
    assert run.status == "running"  # it was created a moment ago
    assert run.last_seen == run.created


# Trouble while recording


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, monkeypatch, caplog, hasty):
    seals = []

    def refuse(*arguments):
        seals.append(1)
        raise OSError(28, "No space left on device")

    sound = writer_module.write_shard
    monkeypatch.setattr(writer_module, "write_shard", refuse)
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer, 3)
        wait_for(lambda: len(seals) >= 3)
        assert not shards(tmp_path / "run")
        monkeypatch.setattr(writer_module, "write_shard", sound)
        train(model, optimizer, 2, start=3)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3, 4]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "cannot write to" in message and "No space left on device" in message
    assert "Training goes on; recording does too when the place is back" in message
    assert not run.problems


def test_a_disk_that_stays_full_still_lets_training_end(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        monkeypatch.setattr(writer_module, "write_shard", refuse)
        monkeypatch.setattr(writer_module, "write_json", refuse)
        monkeypatch.setattr(writer_module, "beat", refuse)
        train(model, optimizer, 3)
    begun, ended = [record.getMessage() for record in caplog.records]
    assert "Training goes on" in begun
    why = "not recorded: 3 steps, from 0 to 2 (the run could not be written (No space left on device))"
    assert f"{why}; and its end could not be marked, so that it will be shown as stopped." in ended
    assert probes.open_run(tmp_path / "run").metrics == []


def test_a_token_snapshot_on_a_full_disk_is_one_warning_and_told(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, tokens_every=2):
        monkeypatch.setattr("probes.tokens.write_shard", refuse)
        train(model, optimizer, 3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "No space left on device" in message and "Training goes on" in message
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2] and not len(run.token_steps)
    told = json.loads((tmp_path / "run" / files.END).read_text())["missing"]
    assert told == {
        "token_depth_weight": {"step": 0, "cause": "the run could not be written (No space left on device)"}
    }


def test_a_writer_that_cannot_keep_up_drops_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_QUEUE", 2)
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1) as recorder:
        slow = recorder._writer._take
        monkeypatch.setattr(recorder._writer, "_take", lambda fetch: (time.sleep(0.5), slow(fetch)))
        started = time.monotonic()
        train(model, optimizer, 20)
        assert time.monotonic() - started < 5
    end = json.loads((tmp_path / "run" / files.END).read_text())
    run = probes.open_run(tmp_path / "run")
    assert end["dropped"] > 0
    # A hand-over is a step, but the last one, at closing, has no step in it.
    assert 20 <= end["dropped"] + len(run.steps("hidden_rms")) <= 21
    assert run.status == "finished"


def test_numbers_that_cannot_be_fetched_cost_one_step_only(tmp_path, monkeypatch, caplog):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer, 1)

        def broken(values):
            def fetch():
                raise RuntimeError("device lost")

            return fetch

        with monkeypatch.context() as patch:
            patch.setattr("probes.recorder.start_copy", broken)
            train(model, optimizer, 1, start=1)
        train(model, optimizer, 1, start=2)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 2]
    assert "device lost" in caplog.text


def test_a_place_that_another_run_has_taken_is_left_alone(tmp_path, caplog, hasty):
    path = tmp_path / "run"
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1):
        train(model, optimizer, 2)
        wait_for(lambda: shards(path))
        theirs = json.loads((path / files.MANIFEST).read_text())
        write_json(path / files.MANIFEST, theirs | {"created": theirs["created"] + 1})
        wait_for(lambda: caplog.records)
        theirs = {file: file.read_bytes() for file in path.rglob("*.*")}
        train(model, optimizer, 3, start=2)
    assert {file: file.read_bytes() for file in path.rglob("*.*")} == theirs
    begun, ended = [record.getMessage() for record in caplog.records]
    assert f"records no more at {path}: another run was begun at {path}. Training goes on." in begun
    assert re.search(rf"not recorded: \d steps, from \d to 4 \(another run was begun at {path}\)\.$", ended)


def test_what_was_let_go_is_told_by_cause_each_step_once():
    lost = Lost(near=10)
    assert str(lost) == ""
    lost.add([10, 10, 20], "full", rows=3)
    lost.add([20, 30], "full", rows=2)  # what was logged of step 20 came later
    lost.add([-1], "full")  # of no step
    lost.add([50], "slow")
    assert str(lost) == "3 steps, from 10 to 30 (full); step 50 (slow)" and lost.count == 7
    for number in range(200):
        lost.add([100 + number], f"device lost at {number}")
    assert str(lost).endswith("; step 100 (device lost at 0); 199 more for other reasons")
    assert len(lost.gaps()) == 100
