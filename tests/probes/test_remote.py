"""Runs that live elsewhere are read as those that lie here: what is looked at is fetched once, and nothing leaves the cache."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

import probes
from app.cli import main
from benchmarks import long_run
from probes import compacting, elsewhere, remote
from probes.digest import FOLDER
from probes.manifest import RANK_FOLDER, RunError
from probes.remote import cache as caches
from probes.remote import shadow as shadows
from probes.remote.address import address
from probes.remote.cache import BLOCK, Cache
from probes.run import find_runs
from tests.app import made
from tests.probes.models import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def memory(apart):
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


@pytest.fixture
def runs(tmp_path, memory):
    """Two runs, here and at memory://bucket/runs."""
    for name in ("full", "block"):
        made.run(tmp_path / "runs" / name, name, blocks=2, steps=8)
    put(memory, tmp_path / "runs", "/bucket/runs")
    return tmp_path / "runs"


@pytest.fixture
def at_once(monkeypatch):
    """Folders are listed again whenever somebody looks."""
    for name in ("_SOON", "_LATER", "_PART"):
        monkeypatch.setattr(shadows, name, 0.0)


def put(files, folder: Path, to: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def same(one: probes.Run, other: probes.Run) -> bool:
    assert one.metrics == other.metrics
    for name in one.metrics:
        np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_array_equal(one.steps(name), other.steps(name))
    return one.status == other.status and one.problems == other.problems


def shadow() -> shadows.Shadow:
    (found,) = elsewhere.all_of_them()
    return found


def shadow_of(run: probes.Run) -> shadows.Shadow:
    return elsewhere.of(run.path)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_elsewhere_reads_as_here(runs):
    found = list(probes.list_runs("memory://bucket/runs"))
    assert [run.name for run in found] == ["block", "full"]
    assert all(same(run, probes.open_run(runs / run.name)) for run in found)
    assert same(probes.open_run("memory://bucket/runs/full"), probes.open_run(runs / "full"))
    assert same(probes.open_run(Path("memory://bucket/runs/full")), probes.open_run(runs / "full"))


def test_what_did_not_change_is_fetched_once(runs, at_once, monkeypatch):
    run = probes.open_run("memory://bucket/runs/full")
    assert 0 < shadow().fetched <= size(runs / "full")
    before = shadow().fetched
    run.refresh()
    same(probes.open_run("memory://bucket/runs/full"), run)
    assert shadow().fetched == before
    # Another process finds all of it in the cache.
    monkeypatch.setattr(remote, "_shadows", {})
    monkeypatch.setattr(elsewhere, "_shadows", {})
    same(probes.open_run("memory://bucket/runs/full"), run)
    assert shadow().fetched == 0


def test_to_list_runs_fetches_what_says_what_they_are(runs):
    paths = find_runs(remote.local("memory://bucket/runs"))
    assert [path.name for path in paths] == ["block", "full"]
    small = sum(path.stat().st_size for path in runs.glob("*/*.json"))
    assert shadow().fetched == small


def test_a_growing_run_is_followed(tmp_path, memory, at_once, hasty):
    writer = made.RunWriter(tmp_path / "run", told := made.manifest("full", 2))
    put(memory, tmp_path / "run", "/bucket/run")
    run = probes.open_run("memory://bucket/run")
    assert run.status == "running" and run.metrics == []
    seen = 0
    for step in (0, 10, 20):
        rows = list(made.rows("full", told.layout, step))
        writer.put(lambda rows=rows: rows, step)
        wait_for(lambda step=step: probes.open_run(tmp_path / "run").last_step == step)
        put(memory, tmp_path / "run" / RANK_FOLDER, f"/bucket/run/{RANK_FOLDER}")
        assert run.refresh() and run.last_step == step
        new = shadow().fetched - seen
        assert new < 2 * size(tmp_path / "run" / RANK_FOLDER) / (step // 10 + 1) + 10_000
        seen = shadow().fetched
    writer.close("finished")
    put(memory, tmp_path / "run", "/bucket/run")
    run.refresh()
    assert run.status == "finished" and same(run, probes.open_run(tmp_path / "run"))


def test_of_a_long_run_only_what_is_looked_at_is_fetched(tmp_path, memory):
    long_run.make(tmp_path / "run", 4_000, 8)
    here = probes.open_run(tmp_path / "run")
    (attempt,) = here.attempts
    list(compacting.compact(attempt, here.layout, attempt.shards / FOLDER))
    put(memory, tmp_path / "run", "/bucket/run")
    run, whole = probes.open_run("memory://bucket/run"), size(tmp_path / "run" / RANK_FOLDER)
    assert run.last_step == here.last_step and shadow().fetched < whole / 10
    bins = run.series("hidden_rms").bins(100)
    np.testing.assert_array_equal(
        bins.high, probes.open_run(tmp_path / "run").series("hidden_rms").bins(100).high
    )
    row = run.series("depth_weight").at([3])
    np.testing.assert_array_equal(row, probes.open_run(tmp_path / "run").series("depth_weight").at([3]))
    assert shadow().fetched < whole / 5
    before = shadow().fetched
    run.series("depth_weight").at([3])
    assert shadow().fetched == before


def test_the_cache_has_a_bound(runs, apart, at_once, monkeypatch):
    most = size(runs / "full" / RANK_FOLDER) + BLOCK
    monkeypatch.setenv(caches.SIZE, f"{most / 1e3:.0f}kB")
    for _ in range(2):
        for name in ("full", "block"):
            assert same(probes.open_run(f"memory://bucket/runs/{name}"), probes.open_run(runs / name))
            held = sum(512 * path.stat().st_blocks for path in apart.rglob("*.safetensors"))
            assert held <= most + 2 * BLOCK
    monkeypatch.setattr(remote, "_cache", None)
    monkeypatch.setattr(remote, "_shadows", {})
    monkeypatch.setenv(caches.SIZE, "many")
    with pytest.raises(
        RunError, match=r"DEPTHSCOPE_CACHE_SIZE is 'many', which is no size: write it as 8GB or 500MB"
    ):
        probes.open_run("memory://bucket/runs/full")


def test_a_damaged_cache_is_fetched_again(runs, apart, at_once, monkeypatch):
    run = probes.open_run("memory://bucket/runs/full")
    for path in apart.rglob("*.safetensors"):
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff\xfe\xfd")
    assert same(probes.open_run("memory://bucket/runs/full"), run)
    (apart / "cache" / "depthscope" / "remote" / "index.sqlite").write_bytes(b"no index at all" * 100)
    for name in ("_shadows",):
        monkeypatch.setattr(remote, name, {})
        monkeypatch.setattr(elsewhere, name, {})
    monkeypatch.setattr(remote, "_cache", None)
    assert same(probes.open_run("memory://bucket/runs/full"), probes.open_run(runs / "full"))


def test_a_run_recorded_anew_at_the_same_place_is_seen(runs, memory, at_once):
    before = probes.open_run("memory://bucket/runs/full")
    memory.rm("/bucket/runs/full", recursive=True)
    with pytest.raises(RunError, match="There is no run at memory://bucket/runs/full"):
        probes.open_run("memory://bucket/runs/full")
    put(memory, runs / "block", "/bucket/runs/full")
    assert same(probes.open_run("memory://bucket/runs/full"), probes.open_run(runs / "block"))
    assert before["loss"].size


HOSTILE = [
    "../escaped.json", "../../escaped.safetensors", "/etc/escaped", "a\\b.json", "x\x1b[2J.json", ".hidden", "..", "n" * 300,
    "run.json/inside",
]  # fmt: skip


class Hostile(fsspec.get_filesystem_class("memory")):
    """A store that lists what no store should."""

    protocol = "hostile"
    cachable = False

    def ls(self, path, detail=True, **kwargs):
        found = [
            {"name": f"{path}/{name}", "size": 3, "type": kind}
            for name in HOSTILE
            for kind in ("file", "directory")
        ]
        names = ("run.json", "heartbeat.json", f"{1:012}-{2:012}.safetensors", f"{3:012}-{4:012}.safetensors")
        sizes = (2**62, -5, 2**62, "many")
        found += [
            {"name": f"{path}/{name}", "size": n, "type": "file"}
            for name, n in zip(names, sizes, strict=True)
        ]
        found += [
            {"name": f"{path}/loop", "size": 0, "type": "directory"},
            {"name": path, "size": 1, "type": "link"},
        ]
        return found

    def cat_file(self, path, start=None, end=None, **kwargs):
        return b"{" * min(end or 100, 1 << 20)


def test_hostile_names_and_sizes_stay_in_the_cache(apart, tmp_path):
    fsspec.register_implementation("hostile", Hostile, clobber=True)
    with pytest.raises(RunError, match=r"hostile://bucket cannot be opened|is larger than|unreadable"):
        probes.open_run("hostile://bucket")
    assert list(probes.list_runs("hostile://bucket")) == []
    inside = apart / "cache" / "depthscope" / "remote"
    there = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert there and all(path.is_relative_to(inside) for path in there)
    assert not any("escaped" in path.name or path.name.startswith(".") for path in there)
    assert sum(512 * path.stat().st_blocks for path in there) < 8 << 20


@pytest.mark.parametrize(
    "given", ["memory://a/../b", "memory://a/.hidden", "memory://a/b\\c", "memory://a/x\x1b[2J"]
)
def test_addresses_that_lead_elsewhere_are_refused(given):
    with pytest.raises(RunError, match="is no name of a folder"):
        address(given)


def test_paths_of_this_machine_are_no_addresses(tmp_path, runs):
    assert address(tmp_path) is None and address("runs/a") is None and address(f"file://{tmp_path}") is None
    (tmp_path / "s3:" / "a").mkdir(parents=True)
    assert address(tmp_path / "s3:" / "a") is None
    assert probes.open_run(f"file://{runs}/full").path == runs / "full"


def test_secrets_are_neither_shown_nor_kept(runs, apart):
    given = address("sftp://me:hunter2@host/runs?token=abc")
    assert given.shown == "sftp://me@host/runs" and "hunter2" not in given.hide(
        f"bad login hunter2 at {given.url}"
    )
    assert address("s3://key:hunter2@bucket/runs").shown == "s3://bucket/runs"


def test_a_missing_package_is_named():
    code = "import sys, probes\nsys.modules[sys.argv[2]] = None\ntry:\n probes.open_run(sys.argv[1])\n"
    code += "except probes.RunError as error:\n print(error)"
    for url, module, wanted in (
        ("s3://bucket/a", "fsspec", 's3://bucket/a needs fsspec: pip install "depthscope[remote]".'),
        ("gs://bucket/a", "fsspec", 'gs://bucket/a needs fsspec: pip install "depthscope[remote]" gcsfs.'),
        ("gs://bucket/a", "gcsfs", "gs://bucket/a needs gcsfs: pip install gcsfs."),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, url, module], capture_output=True, text=True, cwd=ROOT
        )
        assert done.stdout.strip() == wanted, done.stderr
    with pytest.raises(
        RunError, match=r"nosuch://bucket/a cannot be opened \(.*\): give a folder, or an address like s3://"
    ):
        probes.open_run("nosuch://bucket/a")


def test_commands_take_addresses(runs, memory, at_once):
    done = CliRunner().invoke(main, ["check", "memory://bucket/runs"])
    assert done.exit_code == 0 and "memory://bucket/runs/full: sound." in done.output
    name = next(name for name in memory.find("/bucket/runs/full") if name.endswith(".safetensors"))
    memory.pipe_file(name, memory.cat_file(name)[:-1])
    done = CliRunner().invoke(main, ["check", "memory://bucket/runs"])
    assert done.exit_code == 1 and "memory://bucket/runs/full: 1 defect" in done.output
    for command in (["check", "--repair"], ["compact"], ["attribute"], ["demo", "--no-serve", "--runs"]):
        done = CliRunner().invoke(main, [*command, "memory://bucket/runs"])
        assert done.exit_code == 1 and "here" in done.output and len(done.output.splitlines()) == 1, (
            done.output
        )
    done = CliRunner().invoke(main, ["dash", "memory://bucket/nothing"])
    assert done.exit_code == 1 and "There is no folder memory://bucket/nothing" in done.output
    done = CliRunner().invoke(main, ["dash", "nosuch://bucket/nothing"])
    assert done.exit_code == 1 and "cannot be opened" in done.output


def test_two_processes_may_share_a_cache(tmp_path):
    one, other = (Cache(tmp_path / "cache", 1 << 20) for _ in range(2))
    one.place([("a/b", 3 * BLOCK, "v1")])
    other.keep("a/b", BLOCK, b"x" * BLOCK)
    assert one.read("a/b", BLOCK, BLOCK + 3) == b"xxx" and one.missing("a/b", 0, 3 * BLOCK) == [
        (0, BLOCK),
        (2 * BLOCK, 3 * BLOCK),
    ]
    one.place([("a/b", 3 * BLOCK, "v2")])
    assert other.read("a/b", BLOCK, BLOCK + 3) is None and other.held == 0


def test_a_lost_connection_leaves_what_was_fetched(tmp_path, bucket, at_once, monkeypatch):
    monkeypatch.setattr(shadows, "_FIRST_WAIT", 0.1)
    for name in ("full", "block"):
        made.run(tmp_path / name, name, blocks=2, steps=4)
        put(bucket.files(), tmp_path / name, f"bucket/cut/{name}")
    list(probes.list_runs("s3://bucket/cut"))  # full and block are fetched now
    run = probes.open_run("s3://bucket/cut/full")
    bucket.port.close()
    try:
        assert not run.refresh() and same(probes.open_run("s3://bucket/cut/full"), run)
        (trouble,) = remote.troubles()
        assert trouble.startswith("s3://bucket/cut has not answered since ") and "secret" not in trouble
        for reading in (probes.open_run, lambda address: next(probes.list_runs(address))):
            with pytest.raises(RunError, match="s3://bucket/never-seen has not answered since"):
                reading("s3://bucket/never-seen")
        assert [path.name for path in find_runs(remote.local("s3://bucket/cut"))] == ["block", "full"]
        # A command that ends does not promise to keep asking, and takes nothing for damage that it could not fetch.
        done = CliRunner().invoke(main, ["check", "s3://bucket/cut"])
        assert done.exit_code == 1 and done.output.count("\n") == 1
        assert "s3://bucket/cut has not answered since" in done.output and "keeps asking" not in done.output
    finally:
        bucket.port.open()
    wait_for(lambda: run.refresh() or not shadow_of(run).trouble)
    assert same(run, probes.open_run(tmp_path / "full"))


def test_nothing_of_local_reading_asks_elsewhere(runs):
    assert os.environ and not elsewhere.all_of_them()
    probes.open_run(runs / "full")
    assert not elsewhere.all_of_them()
