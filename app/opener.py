"""The one opener: finds runs below folders, opens each once for all sessions, looks for new shards."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app import glance
from app.glance import Glance, Unread
from app.snapshot import Followed, Snapshot
from probes import RunError
from probes.careful import visible
from probes.manifest import MANIFEST
from probes.run import find_runs, place_of

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
    tags: tuple[str, ...] = ()


def folders() -> list[Path]:
    """The folders to look in: the script's arguments, else runs/ and sample_runs/ where they exist."""
    given = [_place(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    return given or default_folders()


def _place(argument: str) -> Path:
    try:
        return place_of(argument)
    except RunError:  # which the command line has told
        return Path(argument)


def default_folders() -> list[Path]:
    return [Path(name) for name in DEFAULT_FOLDERS if Path(name).is_dir()]


def find(roots: list[Path]) -> list[Entry]:
    """Every run at or below the roots, oldest first, unreadable ones with their problem."""
    paths = list(dict.fromkeys(path for root in roots for path in find_runs(root)))
    names = _names(paths, roots)
    found = []
    for path in paths:
        try:
            run = glance.unread(path, _stamp(path))
            residual, tags = str(run.config.get("residual", "")), tuple(map(str, run.tags))
            found.append(Entry(names[path], path, run.manifest.created, residual=residual, tags=tags))
        except RunError as error:
            found.append(Entry(names[path], path, problem=str(error)))
    return sorted(found, key=lambda entry: (entry.created, entry.name))


def opened(entry: Entry) -> Snapshot:
    """The run of an entry as it is now. Raises RunError."""
    return _open(os.fsencode(entry.path), _stamp(entry.path)).look()


def glanced(entry: Entry) -> Glance:
    """How the run of an entry is now, without opening it. Raises RunError."""
    return glance.glance(entry.path, _stamp(entry.path))


def unread(entry: Entry) -> Unread:
    """What the run of an entry is, by its manifest. Raises RunError."""
    return glance.unread(entry.path, _stamp(entry.path))


def worth_showing(entries: Sequence[Entry], most: int) -> list[Entry]:
    """The runs to begin with, oldest first: the newest of each residual, one that did not stop before one that did."""
    newest = sorted(entries, key=lambda entry: entry.created, reverse=True)[:_LOOKED_AT]
    newest.sort(key=_stopped)
    firsts = list({entry.residual: entry for entry in reversed(newest)}.values())
    chosen = firsts[:most] + [entry for entry in newest if entry not in firsts][: most - len(firsts[:most])]
    return sorted(chosen, key=lambda entry: (entry.created, entry.name))


def _stopped(entry: Entry) -> bool:
    try:
        return glanced(entry).status == "stopped"
    except RunError:  # deleted since it was found
        return True


def _names(paths: list[Path], roots: list[Path]) -> dict[Path, str]:
    """A folder's own name where no other has it, else as much of its path as tells it apart; on one line, whatever is in it:
    Vega's expressions, which hold names, do not."""
    names = {path: visible(path.resolve().name) for path in paths}
    depth = 1
    while len(set(names.values())) < len(paths) and depth < 20:
        depth += 1
        twice = {name for name in names.values() if list(names.values()).count(name) > 1}
        for path, name in names.items():
            if name in twice:
                names[path] = visible("/".join(path.resolve().parts[-depth:]))
    return names


def _stamp(path: Path) -> int:
    """Changes when another run is recorded in the same place."""
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except OSError:
        return 0


@st.cache_resource(show_spinner="Opening the run …", max_entries=64)
def _open(path: bytes, stamp: int) -> Followed:
    # Bytes, for Streamlit makes a key of them; the name of a folder need not be text.
    return Followed(Path(os.fsdecode(path)))
