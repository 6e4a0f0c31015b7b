"""Runs from strangers: nothing outside their folder is read or written, and whatever is in it gets a sentence."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

import probes
from probes import checking
from probes import manifest as files
from probes import run as reader
from probes.digest import FOLDER
from probes.layout import Layer, Layout
from probes.manifest import Manifest
from probes.shard import shard_name, write_shard
from tests.probes import digested
from tests.probes.hostile import SECONDS
from tests.probes.models import shards
from tests.probes.mutations import GOLDEN, sealed

LONG = (pytest.mark.long, pytest.mark.timeout(7200))


# The many in ranges, so that one that is stopped is not all that is lost.
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 2000), *(pytest.param(first, 10_000, marks=LONG) for first in range(10_000, 110_000, 10_000))],
)
def test_changed_runs_get_sentences_within_little_memory(first, count, tmp_path):
    """No exception but RunError, no hang, and no more than 512 MiB more than an idle reader has."""
    command = [sys.executable, "-m", "tests.probes.hostile", str(tmp_path), str(count), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} runs from {first} on" in done.stdout


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(GOLDEN / "format-2", tmp_path / "run"))


# Out of its folder


def test_links_lead_nowhere(run, tmp_path):
    """A sound shard and a sound folder, but somewhere else."""
    secret = Path(shutil.copytree(GOLDEN / "format-2", tmp_path / "secret"))
    everything = probes.open_run(run)
    for name in (shards(run)[0].relative_to(run), Path(files.RANK_FOLDER), Path("attempt-00001")):
        kept = tmp_path / "kept"
        (run / name).rename(kept)
        (run / name).symlink_to(secret / name)
        opened = probes.open_run(run)
        assert opened.size < everything.size
        assert any("a link" in str(d) or "is not a folder" in str(d) for d in checking.check(run).defects), (
            name
        )
        (run / name).unlink()
        kept.rename(run / name)
    (run / files.MANIFEST).unlink()
    (run / files.MANIFEST).symlink_to(secret / files.MANIFEST)
    with pytest.raises(probes.RunError, match=r"its run\.json is unreadable \(is a link to somewhere else\)"):
        probes.open_run(run)


def test_a_repair_does_not_leave_the_run(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "quarantine").symlink_to(tmp_path / "elsewhere")
    os.truncate(shards(run)[0], 10)
    found = checking.check(run)
    with pytest.raises(FileExistsError):
        checking.repair(found)
    assert list((tmp_path / "elsewhere").iterdir()) == [] and len(shards(run)) == 1


@pytest.mark.parametrize("name", [files.MANIFEST, files.HEARTBEAT, files.END])
def test_a_pipe_does_not_make_a_reader_wait(name, run):
    (run / name).unlink()
    os.mkfifo(run / name)
    # In a process of its own, which can be given up.
    code = f"import probes; print(probes.open_run({str(run)!r}).problems)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS * 3)
    if name == files.MANIFEST:
        assert "RunError" in done.stderr and "is not a regular file" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


# Too much


def test_a_shard_larger_than_any_is_not_read(run):
    with open(shards(run)[0], "r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room on the disk
    (problem,) = probes.open_run(run).problems
    assert "is larger than the 1024 MiB that belong there" in problem


@pytest.mark.parametrize("extra", [0, 5])
def test_a_large_file_that_is_no_shard_by_its_header_is_not_read(run, extra):
    size = 900 << 20
    header = {"loss": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(shards(run)[0], "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size + extra)  # sparse: it takes no room on the disk
    tracemalloc.start()
    try:
        (problem,) = probes.open_run(run).problems
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert ("holds more than its header says" if extra else "has no checksum") in problem


def test_a_header_larger_than_any_is_not_parsed(run):
    content = struct.pack("<Q", 64 << 20) + b"{" + b" " * (64 << 20)
    shards(run)[0].write_bytes(content)
    assert "its header is not JSON" in probes.open_run(run).problems[0]


def test_cells_that_do_not_exist_are_counted_before_they_are_made(tmp_path, monkeypatch):
    """A triangle whose reads have one source each is small on the disk and large in memory."""
    monkeypatch.setattr(reader, "_MOST_MEMORY", 32 << 20)
    layers = [Layer(i, "layer", 1, "x") for i in range(1, 4001)]
    layout = Layout.build(layers, [1] * 4000 + [4001])
    path = tmp_path / "run"
    (path / files.RANK_FOLDER).mkdir(parents=True)
    manifest = Manifest(layout, 0.0, 1, 1).to_json()
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    rows = {
        "depth_weight": np.zeros((1, layout.cells()), np.float32),
        "depth_weight.step": np.zeros(1, np.int64),
    }
    write_shard(path / files.RANK_FOLDER / shard_name(0, 0), rows, {"format": "2"})
    run = probes.open_run(path)
    assert run.metrics == [] and "would not fit into this machine's memory" in run.problems[0]


def test_a_run_that_does_not_fit_into_memory_is_read_as_far_as_it_does(run, monkeypatch):
    monkeypatch.setattr(reader, "_MOST_MEMORY", probes.open_run(run).attempts[0].held)
    opened = probes.open_run(run)
    assert opened.steps("loss").tolist() == [0, 1, 2, 3]
    assert "Steps 4 to 9 are missing" in opened.problems[0] and "memory" in opened.problems[0]
    assert not checking.check(run).defects, "a check keeps nothing in memory"


def test_ten_thousand_layers_are_refused(run):
    manifest = json.loads((run / files.MANIFEST).read_text())
    manifest["layout"]["layers"] *= 2500
    (run / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(probes.RunError, match="more than 4096 layers or sources"):
        probes.open_run(run)


def test_a_thousand_broken_shards_give_few_sentences(run):
    for step in range(1000):
        (run / "attempt-00001" / files.RANK_FOLDER / shard_name(20 + step, 20 + step)).write_bytes(b"")
    problems = probes.open_run(run).problems
    assert len(problems) == 31 and problems[-1] == "And 970 more like these: run depthscope check."


# Words


def test_what_a_run_says_cannot_command_a_terminal(run):
    end = json.loads((run / "attempt-00001" / files.END).read_text())
    body = json.dumps({**end, "status": "stopped", "reason": "\x1b[2Jgone\n"}, indent=1)
    (run / "attempt-00001" / files.END).write_text(body)
    assert probes.open_run(run).status_reason == "\N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}"


def test_metrics_of_a_later_depthscope_are_passed_over(run):
    rows = {
        "hidden_rms": np.ones((1, 5), np.float32), "hidden_rms.step": np.full(1, 20),
        "spectrum": np.ones((1, 3, 7), np.float32), "spectrum.step": np.full(1, 20),
        "lonely": np.ones((2, 2), np.float32), "alone": np.ones(2, np.float32),
        "mine": np.ones(1, np.float16), "mine.step": np.full(1, 20),
    }  # fmt: skip
    folder = run / "attempt-00001" / files.RANK_FOLDER
    write_shard(folder / shard_name(20, 20), rows, {"format": "2", "attempt": "1", "shard": "1", "rank": "0"})
    opened = probes.open_run(run)
    assert (
        not opened.problems and "spectrum" not in opened and "lonely" not in opened and "alone" not in opened
    )
    assert opened.last_step == 20 and opened["mine"].tolist() == [1] and opened["mine"].dtype == np.float32


def test_the_checksum_of_a_strangers_file_is_no_pass(run):
    """A shard may have a right checksum and wrong content: steps that are not those of its name."""
    path = shards(run)[0]
    rows = {"loss": np.ones(1, np.float32), "loss.step": np.full(1, -5)}
    path.unlink()
    write_shard(path, rows, {"format": "2"})
    assert zlib.crc32(path.read_bytes())
    assert "holds steps -5 to -5, which are not those of its name" in probes.open_run(run).problems[0]


def test_a_header_of_endless_products_is_refused_at_once(run):
    """Each number is short enough to be read; a million of them multiplied would take hours."""
    entry = {"dtype": "F32", "shape": [10**1000] * 1000, "data_offsets": [0, 4]}
    text = json.dumps({"loss": entry}).encode()
    shards(run)[0].write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "other numbers than sizes" in probes.open_run(run).problems[0]


# Digests with right checksums


def twice(header: dict, data: bytearray) -> None:
    """The first shard covered twice, so that it has room for twice as many rows."""
    first, _ = header["shards"]["data_offsets"]
    data[first + 40 : first + 80] = data[first : first + 40]


def told(change):
    """A change of what is told of metrics."""

    def changes(header: dict, data: bytearray) -> None:
        metrics = json.loads(header["__metadata__"]["metrics"])
        header["__metadata__"]["metrics"] = json.dumps(change(metrics))

    return changes


def column(**changes):
    return told(lambda metrics: metrics | {"loss": metrics["loss"] | changes})


DIGESTS = {
    "a list": told(lambda metrics: [metrics]),
    "rows of text, a terabyte of them": column(rows="x", width=1 << 40),
    "a list of rows, as many": column(rows=[0], width=1 << 40),
    "rows that are no number": column(rows=float("nan")),
    "more rows than anything": column(rows=1 << 62),
    "steps of nobody": column(steps=["steps.0"]),
    "steps behind the last": column(last=10**400),
    "a name that commands": told(
        lambda metrics: {"\x1b[2J" if k == "loss" else k: v for k, v in metrics.items()}
    ),
    "a field too many": column(more=1),
    "a shard twice": twice,
    "steps in floats": lambda header, data: header["steps.0"].update(dtype="F64"),
    "no axes": lambda header, data: header["shards"].update(shape=[]),
}


@pytest.mark.parametrize("change", DIGESTS.values(), ids=list(DIGESTS))
def test_a_digest_that_promises_too_much_is_passed_over(change, tmp_path, few):
    path = digested.two_attempts(tmp_path / "run", (4, 0), 90)
    shutil.rmtree(path / "attempt-00001")
    wanted = digested.values(probes.open_run(path))
    digested.compacted(path)
    file, *others = sorted((path / files.RANK_FOLDER / FOLDER).iterdir())
    for other in others:
        other.unlink()
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    assert sealed(header, data) and not probes.open_run(path).problems
    change(header, data)
    file.write_bytes(sealed(header, data))
    found = probes.open_run(path)
    digested.same(found, wanted)
    assert not found.attempts[0].digests and len(found.problems) == 1
    assert "the shards are read instead" in found.problems[0] and found.problems[0].isprintable()
    assert len(found.problems[0]) < 600
