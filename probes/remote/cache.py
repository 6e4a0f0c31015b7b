"""The cache of what was fetched: files of the right size, filled in blocks, those unused for longest emptied first.

A file here is as large as the one it stands for and holds nothing (a sparse file takes no room) until somebody reads it.
What is there, of which version, and the checksum of each block stand in an index, which several processes may use.
"""

import contextlib
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probes.manifest import RunError

SIZE = "DEPTHSCOPE_CACHE_SIZE"
MOST_BYTES = 4 << 30  # of all addresses together, where nobody says otherwise
BLOCK = 64 << 10

_FRESH = 60.0  # seconds in which a file is not marked as used again


def root() -> Path:
    """Where the cache lies: below XDG_CACHE_HOME, else ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "depthscope" / "remote"


@dataclass
class _File:
    """A file's version, size, and for each block its checksum, -1 where it is not there."""

    stamp: str
    size: int
    sums: np.ndarray


class Cache:
    """Files below `root`, by their path relative to it. All methods may be called from several threads."""

    def __init__(self, root: Path, most: int):
        """Raises RunError where the folder cannot be written."""
        self.root, self.most = root, most
        self._lock = threading.RLock()
        self._used: dict[str, float] = {}
        try:
            root.mkdir(parents=True, exist_ok=True)
            try:
                self._index = self._open()
            except sqlite3.DatabaseError:  # damaged: what it knew is fetched again
                (root / "index.sqlite").unlink()
                self._index = self._open()
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"What is fetched cannot be kept in {root} ({error}): name another folder with XDG_CACHE_HOME."
            ) from error

    def _open(self) -> sqlite3.Connection:
        index = sqlite3.connect(
            self.root / "index.sqlite", timeout=20, check_same_thread=False, isolation_level=None
        )
        index.execute("PRAGMA synchronous=OFF")  # a block is believed for its checksum, not for the index
        index.execute(
            "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT, size INTEGER, sums BLOB, "
            "held INTEGER, used REAL)"
        )
        return index

    # What is known of the other side

    def stamps(self, folder: str) -> dict[str, tuple[int, str]]:
        """Size and version of the files in a folder, as far as they are known here."""
        with self._lock:
            rows = self._index.execute(
                "SELECT path, size, stamp FROM files WHERE path >= ? AND path < ?",
                (folder + "/", folder + "0"),
            ).fetchall()
        at = len(folder) + 1
        return {path[at:]: (size, stamp) for path, size, stamp in rows if "/" not in path[at:]}

    def place(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Files (path, size, version) that are there, or are another version: empty now, and of that size."""
        with self._lock:
            rows = []
            for path, size, stamp in files:
                self._empty(path, size, stamp)
                rows.append((path, stamp, size, b"", 0, time.time()))
            with self._transaction():
                self._index.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def note(self, path: str, size: int, stamp: str) -> None:
        """A small file that somebody else has put here whole is of this version."""
        with self._lock:
            self._index.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, 0, ?)",
                (path, stamp, size, b"", time.time()),
            )

    def forget(self, paths: Iterable[str]) -> None:
        """Files that are there no more."""
        with self._lock:
            for path in paths:
                (self.root / path).unlink(missing_ok=True)
                self._index.execute("DELETE FROM files WHERE path = ?", (path,))

    # Bytes

    def missing(self, path: str, start: int, stop: int) -> list[tuple[int, int]]:
        """Stretches of bytes that have to be fetched before those from `start` to `stop` can be read."""
        with self._lock:
            file = self._file(path)
            if file is None:
                return []
            first, last = start // BLOCK, -(-min(stop, file.size) // BLOCK)
            lacking = np.flatnonzero(file.sums[first:last] < 0) + first
            groups = np.split(lacking, np.flatnonzero(np.diff(lacking) > 1) + 1) if len(lacking) else []
            return [(int(each[0]) * BLOCK, min(int(each[-1] + 1) * BLOCK, file.size)) for each in groups]

    def keep(self, path: str, start: int, content: bytes) -> None:
        """Bytes that were fetched, from a block's first on. Raises OSError when the disk refuses."""
        with self._lock:
            file = self._file(path)
            if file is None or start + len(content) > file.size:
                return  # another version by now
            with open(self.root / path, "r+b") as out:
                out.seek(start)
                out.write(content)
            self._date(path, file.stamp)
            whole = memoryview(content)
            for at in range(0, len(content), BLOCK):
                if at + BLOCK <= len(content) or start + len(content) == file.size:
                    file.sums[(start + at) // BLOCK] = zlib.crc32(whole[at : at + BLOCK])
            self._write(path, file)
            self._bound(path)

    def read(self, path: str, start: int, stop: int) -> bytes | None:
        """Those bytes; None where some are not there, or not as they were fetched: then they count as missing."""
        with self._lock:
            file = self._file(path)
            if file is None:
                return None
            stop = min(stop, file.size)
            first, last = start // BLOCK, -(-stop // BLOCK)
            if (file.sums[first:last] < 0).any():
                return None
            with open(self.root / path, "rb") as source:
                source.seek(first * BLOCK)
                content = source.read(min(last * BLOCK, file.size) - first * BLOCK)
            for number in range(first, last):
                at = (number - first) * BLOCK
                if zlib.crc32(memoryview(content)[at : at + BLOCK]) != file.sums[number]:
                    file.sums[number] = -1
                    self._write(path, file)
                    return None
            if time.time() - self._used.get(path, 0) > _FRESH:
                self._used[path] = time.time()
                self._index.execute("UPDATE files SET used = ? WHERE path = ?", (time.time(), path))
            return content[start - first * BLOCK : stop - first * BLOCK]

    @property
    def held(self) -> int:
        """Bytes that were fetched and are still here."""
        with self._lock:
            return self._index.execute("SELECT COALESCE(SUM(held), 0) FROM files").fetchone()[0]

    # The disk and the index

    def _file(self, path: str) -> _File | None:
        row = self._index.execute("SELECT stamp, size, sums FROM files WHERE path = ?", (path,)).fetchone()
        if row is None:
            return None
        stamp, size, sums = row
        known = len(sums) == 8 * _blocks(size)
        return _File(
            stamp, size, np.frombuffer(sums, np.int64).copy() if known else np.full(_blocks(size), -1)
        )

    def _write(self, path: str, file: _File) -> None:
        there = np.flatnonzero(file.sums >= 0)
        held = len(there) * BLOCK - (
            len(file.sums) * BLOCK - file.size if file.sums[-1:].max(initial=-1) >= 0 else 0
        )
        self._used[path] = time.time()
        self._index.execute(
            "UPDATE files SET sums = ?, held = ?, used = ? WHERE path = ?",
            (file.sums.tobytes(), held, time.time(), path),
        )

    def _bound(self, kept: str) -> None:
        """Empty the files unused for longest while all together hold too much."""
        over = self.held - self.most
        if over <= 0:
            return
        rows = self._index.execute(
            "SELECT path, size, stamp, held FROM files WHERE held > 0 AND path != ? ORDER BY used", (kept,)
        )
        for path, size, stamp, held in rows.fetchall():
            if over <= 0:
                return
            self.place([(path, size, stamp)])
            over -= held

    def _empty(self, path: str, size: int, stamp: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as out:
            out.truncate(size)
        self._date(path, stamp)

    def _date(self, path: str, stamp: str) -> None:
        """A file's time tells versions apart, not when it was fetched."""
        os.utime(self.root / path, (zlib.crc32(stamp.encode()),) * 2)

    @contextlib.contextmanager
    def _transaction(self):
        self._index.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._index.execute("ROLLBACK")
            raise
        self._index.execute("COMMIT")


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
