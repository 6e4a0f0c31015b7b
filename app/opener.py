"""The one opener: finds runs below folders, opens each once for all sessions, looks for new shards."""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import streamlit as st

from probes import Run, RunError
from probes.manifest import MANIFEST, Manifest
from probes.run import find_runs

DEFAULT_FOLDERS = ("runs", "sample_runs")
_LOOKED_AT = 24  # newest runs from which the first choice is made


@dataclass(frozen=True)
class Entry:
    """A run that was found: its name here (unique, in links and legends), its folder, or what is wrong."""

    name: str
    path: Path
    created: float = 0.0
    problem: str = ""
    residual: str = ""


class SharedRun(Run):
    """A run that several sessions read at once: they take turns."""

    def __init__(self, path: Path):
        self._turn = threading.RLock()
        super().__init__(path)

    def refresh(self) -> bool:
        with self._turn:
            return super().refresh()

    def steps(self, name: str) -> np.ndarray:
        with self._turn:
            return super().steps(name)

    def __getitem__(self, name: str) -> np.ndarray:
        with self._turn:
            return super().__getitem__(name)


def folders() -> list[Path]:
    """The folders to look in: the script's arguments, else runs/ and sample_runs/ where they exist."""
    given = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    return given or default_folders()


def default_folders() -> list[Path]:
    return [Path(name) for name in DEFAULT_FOLDERS if Path(name).is_dir()]


def find(roots: list[Path]) -> list[Entry]:
    """Every run at or below the roots, oldest first, unreadable ones with their problem."""
    paths = list(dict.fromkeys(path for root in roots if root.is_dir() for path in find_runs(root)))
    names = _names(paths, roots)
    found = []
    for path in paths:
        try:
            manifest = _manifest(path, _stamp(path))
            residual = str(manifest.config.get("residual", ""))
            found.append(Entry(names[path], path, manifest.created, residual=residual))
        except RunError as error:
            found.append(Entry(names[path], path, problem=str(error)))
    return sorted(found, key=lambda entry: (entry.created, entry.name))


def opened(entry: Entry) -> SharedRun:
    """The run of an entry with everything sealed so far. Raises RunError."""
    run = _open(entry.path, _stamp(entry.path))
    run.refresh()
    return run


def worth_showing(entries: Sequence[Entry], most: int) -> list[Entry]:
    """The runs to begin with, oldest first: the newest of each residual, one that did not stop before one that did."""
    newest = sorted(entries, key=lambda entry: entry.created, reverse=True)[:_LOOKED_AT]
    newest.sort(key=_stopped)
    firsts = list({entry.residual: entry for entry in reversed(newest)}.values())
    chosen = firsts[:most] + [entry for entry in newest if entry not in firsts][: most - len(firsts[:most])]
    return sorted(chosen, key=lambda entry: (entry.created, entry.name))


def _stopped(entry: Entry) -> bool:
    try:
        return opened(entry).status == "stopped"
    except RunError:  # deleted since it was found
        return True


def _names(paths: list[Path], roots: list[Path]) -> dict[Path, str]:
    """A folder's own name where no other has it, else as much of its path as tells it apart."""
    names = {path: path.resolve().name for path in paths}
    depth = 1
    while len(set(names.values())) < len(paths) and depth < 20:
        depth += 1
        twice = {name for name in names.values() if list(names.values()).count(name) > 1}
        for path, name in names.items():
            if name in twice:
                names[path] = "/".join(path.resolve().parts[-depth:])
    return names


def _stamp(path: Path) -> int:
    """Changes when another run is recorded in the same place."""
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except OSError:
        return 0


@st.cache_resource(show_spinner=False, max_entries=256)
def _manifest(path: Path, stamp: int) -> Manifest:
    return Manifest.read(path)


@st.cache_resource(show_spinner="Opening the run …", max_entries=64)
def _open(path: Path, stamp: int) -> SharedRun:
    return SharedRun(path)
