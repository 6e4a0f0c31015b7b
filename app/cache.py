"""Cache: digests of long runs that have none of their own, in a folder of the user's; the dashboard writes into no run."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

MOST_BYTES = 8 << 30  # of all runs together; those opened longest ago go first


def root() -> Path:
    """Where depthscope keeps what it can make again: below XDG_CACHE_HOME, else ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "depthscope" / "digests"


def folder(run: Path) -> Path | None:
    """The folder for the digests of a run, which need not be there; the oldest others leave when all are too many. None
    where the user has no home."""
    try:
        base = root()
    except RuntimeError:
        return None
    name = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:32]
    with contextlib.suppress(OSError):
        _leave(base, name)
    return base / name


def _leave(base: Path, kept: str) -> None:
    if (base / kept).is_dir():
        os.utime(base / kept)
    if not base.is_dir():
        return
    others = sorted((one for one in os.scandir(base) if one.is_dir(follow_symlinks=False)), key=_opened)
    sizes = {one.name: _size(Path(one.path)) for one in others}
    total = sum(sizes.values())
    for one in others:
        if total <= MOST_BYTES:
            return
        if one.name != kept:
            shutil.rmtree(one.path, ignore_errors=True)
            total -= sizes[one.name]


def _opened(entry: os.DirEntry) -> float:
    return entry.stat(follow_symlinks=False).st_mtime


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())
