"""`depthscope check`: no changed bit and no missing byte passes, and a repair touches nothing that is sound."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import probes
from app.cli import main
from probes import checking
from probes import manifest as files
from probes.jsonfile import intact, parse_json
from probes.shard import ShardError, parse_shard
from tests.probes.models import decoder, sgd, shards, train, wait_for


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    """A run of three shards of one step each in its first attempt, and one of two in its second, from step 2 on."""
    from probes import writer

    path = tmp_path_factory.mktemp("check") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SEAL_SECONDS", 0.0)
        model = decoder("full", blocks=1)
        optimizer = sgd(model)
        recorder = probes.record(model, path, optimizer=optimizer, every=1)
        for step in range(3):
            train(model, optimizer, 1, step)
            wait_for(lambda step=step: len(shards(path)) == step)
        recorder.close("stopped", "preempted")
    with probes.record(model, path, optimizer=optimizer, every=1, resume=2):
        train(model, optimizer, 2, 2)
    assert len(shards(path)) == 3 and len(shards(path / "attempt-00001")) == 1
    return path


@pytest.fixture
def run(three_shards, tmp_path):
    return Path(shutil.copytree(three_shards, tmp_path / "run"))


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def said(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["check", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


# Every bit, every length


def passes(content: bytes) -> bool:
    try:
        parse_shard(content)
    except ShardError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return False
    return True


def flips(content: bytes, places) -> list[int]:
    """The places, in bits, where a flipped bit passes."""
    unseen, changed = [], bytearray(content)
    for place in places:
        changed[place >> 3] ^= 1 << (place & 7)
        if passes(bytes(changed)):
            unseen.append(place)
        changed[place >> 3] ^= 1 << (place & 7)
    assert changed == content
    return unseen


def test_flipped_bits_and_truncations_of_a_shard_are_seen(three_shards):
    content = shards(three_shards)[0].read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert passes(content)
    chosen = np.random.default_rng(0).permutation(8 * len(content))[:2000]
    assert flips(content, [*range(64), *(chosen.tolist())]) == []
    lengths = [*range(16), *range(header - 4, header + 4), *range(0, len(content), 97), len(content) - 1]
    assert not any(passes(content[:length]) for length in lengths)
    assert not passes(content + b"\0") and not passes(bytes(len(content)))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_flipped_bit_and_every_truncation_of_a_shard_is_seen(three_shards):
    content = shards(three_shards)[0].read_bytes()
    assert flips(content, range(8 * len(content))) == []
    assert not any(passes(content[:length]) for length in range(len(content)))


@pytest.mark.parametrize("name", [files.MANIFEST, files.END, files.HEARTBEAT, "attempt-00001/attempt.json"])
def test_every_flipped_bit_of_a_small_file_is_seen(name, three_shards):
    content = (three_shards / name).read_bytes()
    assert intact(content)
    changed = bytearray(content)
    for place in range(8 * len(content)):
        changed[place >> 3] ^= 1 << (place & 7)
        try:
            parse_json(bytes(changed))
            assert not intact(bytes(changed)), place
        except ValueError:
            pass
        changed[place >> 3] ^= 1 << (place & 7)
    for length in range(len(content)):
        assert not intact(content[:length])


# What is said


def test_a_sound_run(run, tmp_path):
    code, output = said(run)
    assert (code, output.strip()) == (
        0,
        f"{run}: sound. 4 shards in 2 attempts, {probes.open_run(run).size:,} bytes.",
    )
    shutil.copytree(run, tmp_path / "more" / "second")
    code, output = said(tmp_path)
    assert code == 0 and output.count(": sound.") == 2


def test_no_run(tmp_path):
    code, output = said(tmp_path)
    assert code == 1 and f"There is no run at or below {tmp_path}: give a run's folder." in output
    (tmp_path / "scratch").symlink_to(tmp_path, target_is_directory=True)
    assert f"{tmp_path / 'scratch'} is a link, and links are not followed" in said(tmp_path)[1]


def spoil_number(run: Path) -> None:
    content = bytearray(shards(run)[1].read_bytes())
    content[-1] ^= 1
    replaced(shards(run)[1], bytes(content))


def spoil_config(run: Path) -> None:
    content = (run / files.MANIFEST).read_text()
    replaced(run / files.MANIFEST, content.replace('"width": 16', '"width": 17').encode())


def other_model(run: Path) -> None:
    path = run / "attempt-00001" / files.ATTEMPT
    manifest = json.loads(path.read_text())
    manifest["layout"]["layers"][0]["name"] = "another"
    path.write_text(json.dumps(manifest))


DEFECTS = {
    "a number": (spoil_number, "Steps 1 to 1 are missing: shard 000000000001-000000000001.safetensors does not match"),
    "cut off": (lambda run: os.truncate(shards(run)[1], 99), "is not a complete safetensors file (it ends within its"),
    "empty": (lambda run: os.truncate(shards(run)[1], 0), "is not a complete safetensors file (it ends within its header"),
    "gone": (lambda run: shards(run)[1].unlink(), "Steps 1 to 1 are missing: what was sealed there is gone"),
    "moved": (lambda run: shards(run)[1].rename(shards(run)[1].with_name(f"{5:012}-{5:012}.safetensors")), "holds steps 1"),
    "put elsewhere": (
        lambda run: shutil.copy(shards(run)[1], shards(run / "attempt-00001")[0].with_name(shards(run)[1].name)),
        "is of attempt 0, and was put here",
    ),
    "a link": (
        lambda run: (shards(run)[1].rename(run / "elsewhere"), (run / files.RANK_FOLDER / f"{1:012}-{1:012}.safetensors").symlink_to(run / "elsewhere")),
        "is a link to somewhere else",
    ),
    "a changed configuration": (spoil_config, "run.json does not match its checksum"),
    "no manifest to read": (lambda run: replaced(run / files.MANIFEST, b"{"), "cannot be opened: its run.json is unreadable"),
    "a garbled end": (lambda run: replaced(run / files.END, b"\xff"), "end.json is unreadable"),
    "an end without its checksum": (lambda run: replaced(run / files.END, b"{}"), "end.json has lost its checksum"),
    "no shards": (lambda run: shutil.rmtree(run / files.RANK_FOLDER), "rank-00000 is missing or a link"),
    "another model": (other_model, "attempt-00001 is of another model: its layer 1 (attention) was"),
}  # fmt: skip


@pytest.mark.parametrize("how", DEFECTS)
def test_each_defect_is_explained(how, run):
    spoil, sentence = DEFECTS[how]
    spoil(run)
    code, output = said(run)
    assert code == 1 and sentence in output, output
    assert output.startswith(f"{run}: ")


# Repair


def everything(run: Path) -> dict[str, tuple]:
    """Content and time of change of every file of a run."""
    return {
        str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in run.rglob("*")
        if path.is_file()
    }


def test_a_repair_puts_damaged_shards_aside_and_touches_no_other_file(run):
    before = everything(run)
    spoil_number(run)
    bad = shards(run)[1]
    content = bad.read_bytes()
    code, output = said(run, "--repair")
    assert code == 0, output
    aside = f"quarantine/rank-00000/{bad.name}"
    assert f"{bad.name} was put aside: {aside}." in output and ": sound." in output
    after = everything(run)
    assert after.pop(aside)[0] == content
    del before[f"rank-00000/{bad.name}"]
    assert after == before
    code, output = said(run)
    sentence = f"Steps 1 to 1 are missing: shard {bad.name} was damaged and is in quarantine."
    assert code == 0 and f"Note: {sentence}" in output
    opened = probes.open_run(run)
    assert opened.problems == [sentence] and opened.steps("hidden_rms").tolist() == [0, 2, 3]


def test_a_repair_mends_no_manifest_and_says_so(run):
    before = everything(run)
    spoil_config(run)
    code, output = said(run, "--repair")
    assert code == 1 and output.count("run.json does not match its checksum") == 2
    assert {name for name, about in everything(run).items() if about != before[name]} == {files.MANIFEST}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_a_shard_that_may_not_be_read_is_not_taken_for_damaged(three_shards):
    # Not in pytest's folder, into which another user cannot come.
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(three_shards, Path(folder) / "run"))
        for path in (Path(folder), run, *run.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        shards(run)[1].chmod(0)
        child = os.fork()
        if not child:
            os.setuid(65534)
            found = checking.check(run)
            (defect,) = found.defects
            fine = "cannot be read (Permission denied)" in str(defect) and checking.repair(found) == []
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(shards(run)) == 3


def test_a_shard_that_can_be_read_again_is(run, monkeypatch):
    from probes import attempts

    sound, refused = attempts.read_shard, shards(run)[1].name

    def refuse(path):
        if path.name == refused:
            raise attempts.UnreadableShard("cannot be read (Input/output error)")
        return sound(path)

    monkeypatch.setattr(attempts, "read_shard", refuse)
    opened = probes.open_run(run)
    assert len(opened.problems) == 1 and not opened.refresh()
    monkeypatch.undo()
    assert opened.refresh() and not opened.problems
    assert opened.steps("hidden_rms").tolist() == [0, 1, 2, 3]


def test_a_shard_that_was_half_there_is_read_when_it_is_whole(run):
    # As a folder looks while somebody copies it from a cluster.
    shard = shards(run)[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    opened = probes.open_run(run)
    assert len(opened.problems) == 1 and not opened.refresh()
    shard.write_bytes(whole)
    assert opened.refresh() and not opened.problems
    assert opened.steps("hidden_rms").tolist() == [0, 1, 2, 3]


def test_an_attempt_that_was_half_there_is_read_when_it_is_whole(run):
    manifest = run / "attempt-00001" / files.ATTEMPT
    whole = manifest.read_bytes()
    replaced(manifest, whole[: len(whole) // 2])
    opened = probes.open_run(run)
    assert "An attempt is left out" in opened.problems[0] and not opened.refresh()
    replaced(manifest, whole)
    assert opened.refresh() and not opened.problems and len(opened.attempts) == 2


def test_shards_of_another_run_are_not_taken_for_its_own(run, tmp_path):
    """Two folders of the same model, copied into one: no value of the other run is shown."""
    model, other = decoder("full", blocks=1), tmp_path / "other"
    optimizer = sgd(model)
    with probes.record(model, other, optimizer=optimizer, every=1, resume=7):
        train(model, optimizer, 2, 7)
    with probes.record(model, other, optimizer=optimizer, every=1, resume=9):
        train(model, optimizer, 1, 9)
    strange = [
        path.relative_to(other) for folder in (other, other / "attempt-00001") for path in shards(folder)
    ]
    for path in strange:
        shutil.copy(other / path, run / path)
    opened = probes.open_run(run)
    assert opened.steps("hidden_rms").tolist() == [0, 1, 2, 3]
    assert [gap.first for gap in opened.gaps] == [9] and "another run" in opened.problems[0]
    assert said(run, "--repair")[1].count("is of another run, and was put here") == 2
    assert said(run)[0] == 0 and all((run / "quarantine" / path).exists() for path in strange)


def test_a_live_run_is_checked_without_harm(tmp_path, hasty):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        for step in range(5):
            train(model, optimizer, 1, step)
            code, output = said(tmp_path / "run")
            assert code == 0, output
    assert said(tmp_path / "run")[0] == 0
