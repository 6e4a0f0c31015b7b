"""Where readers meet files of other machines: a folder of this machine that shadows one of theirs, filled as it is read.

Until probes.remote has made such a folder, each question here is answered by the local files alone, in no time.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol


class Shadow(Protocol):
    """The folder `root` of this machine, which looks like another one; see probes/remote/shadow.py."""

    root: Path

    def open(self, path: Path, most: int) -> BinaryIO: ...
    def look(self, run: Path) -> None: ...
    def signs(self, folder: Path) -> None: ...
    def find(self, folder: Path) -> None: ...
    def soon(self, paths: list[Path]) -> None: ...
    def shown(self, path: Path) -> str: ...

    @property
    def trouble(self) -> str: ...


_shadows: dict[str, Shadow] = {}


def add(shadow: Shadow) -> None:
    _shadows[str(shadow.root)] = shadow


def of(path: Path) -> Shadow | None:
    """The shadow that a path lies in; None for files of this machine."""
    if not _shadows:
        return None
    text = str(path)
    for root, shadow in _shadows.items():
        if text.startswith(root) and text[len(root) :][:1] in ("", "/", "\\"):
            return shadow
    return None


def all_of_them() -> list[Shadow]:
    return list(_shadows.values())


def look(run: Path) -> None:
    """The run is about to be looked at: what has changed there is known from now on. Never raises."""
    if (shadow := of(run)) is not None:
        shadow.look(run)


def signs(folder: Path) -> None:
    """A folder's small files, which say how a recording is, are about to be read. Never raises."""
    if (shadow := of(folder)) is not None:
        shadow.signs(folder)


def find(folder: Path) -> None:
    """Runs are about to be looked for at or below a folder. Never raises."""
    if (shadow := of(folder)) is not None:
        shadow.find(folder)


def soon(paths: Iterable[Path]) -> None:
    """These files of one folder are about to be read as a whole. Never raises."""
    if _shadows and (paths := list(paths)) and (shadow := of(paths[0])) is not None:
        shadow.soon(paths)


def trouble(path: Path) -> str:
    """A sentence while what a path shadows cannot be reached, else empty."""
    return "" if (shadow := of(path)) is None else shadow.trouble


def shown(path: Path) -> str:
    """What a path is called where somebody reads it: the address of what lies elsewhere."""
    return str(path) if (shadow := of(path)) is None else shadow.shown(path)
