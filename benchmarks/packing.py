"""What comes back from a machine with a GPU: one file, and the places where its parts belong."""

import os
import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath

from benchmarks.parts import RESULTS, RUNS

ROOT = Path(__file__).resolve().parent.parent
DONE, LOGS, PACKED = "done", "logs", "gpu.zip"
PLACES = {RUNS: ROOT / "sample_runs", RESULTS: ROOT / "benchmarks" / "results"}
SMOKE = b"smoke"
MOST = 20e6
"""Bytes of runs that belong into a repository."""


def pack(out: Path, smoke: bool = False) -> None:
    """Everything but checkpoints, wheels and caches, in one file that is whole or not there."""
    kept = [
        path
        for name in (RUNS, RESULTS, LOGS, DONE)
        for path in sorted((out / name).rglob("*"))
        if path.is_file()
    ]
    kept = [path for path in kept if not {"checkpoints", ".unfinished"} & {*path.relative_to(out).parts}]
    temporary = out / f".{PACKED}"
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = SMOKE if smoke else b""
        for path in kept:
            archive.write(path, path.relative_to(out).as_posix())
    os.replace(temporary, out / PACKED)
    size = sum(path.stat().st_size for path in kept if path.relative_to(out).parts[0] == RUNS)
    if size > MOST:
        print(
            f"The runs take {size / 1e6:.0f} MB, more than the {MOST / 1e6:.0f} MB that they may take in a repository."
        )


def unpacked(path: Path, into: Path) -> None:
    """What `pack` packed, and nothing outside of `into`."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            parts_ = PurePosixPath(name).parts
            if parts_[0] not in (RUNS, RESULTS, LOGS, DONE) or ".." in parts_:
                sys.exit(f"{path} holds {name}, which is none of ours: nothing was taken from it.")
        archive.extractall(into)


def place(path: Path) -> None:
    """Put runs and tables where they belong; a run replaces the one of its name."""
    if not path.is_file():
        sys.exit(f"There is no file {path}: give the {PACKED} that the command packed.")
    with zipfile.ZipFile(path) as archive:
        if archive.comment == SMOKE:
            sys.exit(f"{path} is of a smoke run, whose tiny runs and figures belong nowhere.")
    aside = path.with_name(f".{path.name}.unpacked")
    shutil.rmtree(aside, ignore_errors=True)
    unpacked(path, aside)
    for kind, target in PLACES.items():
        for each in sorted((aside / kind).glob("*")):
            if each.is_dir():
                shutil.rmtree(target / each.name, ignore_errors=True)
            target.mkdir(parents=True, exist_ok=True)
            shutil.move(each, target / each.name)
            print(target / each.name)
    shutil.rmtree(aside)
    print(
        "Now: python sample_runs/check.py && python sample_runs/figures.py && python sample_runs/quoted.py, and say in "
        "docs/sample-runs.md what these runs show."
    )
