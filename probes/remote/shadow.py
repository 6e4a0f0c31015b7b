"""A shadow: a folder of the cache that looks like one of another machine. Listing it costs nothing, reading it fetches.

Readers work on it as on any folder. `look` brings it up to date, by listing what may have changed and fetching the small
files that say how a run is; everything else is fetched when it is read, as far as it is read.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from probes import jsonfile, shard
from probes.careful import printable
from probes.manifest import ATTEMPT, END, HEARTBEAT, MANIFEST
from probes.ranks import MANIFEST as RANK
from probes.remote.address import safe
from probes.remote.cache import Cache
from probes.remote.store import Listed, Store, Unreachable
from probes.whole import write_whole

# What a run is and how it is: fetched whole when it changes.
_SMALL = {name: jsonfile.MOST_BYTES for name in (MANIFEST, ATTEMPT, RANK)} | {
    name: jsonfile.MOST_SIGN for name in (HEARTBEAT, END)
}
_LARGE = re.compile(r"(?:[0-9]{12,16}-[0-9a-f]{12,16}|tokens-[0-9]{12,16})\.safetensors")
_FOLDER = re.compile(r"attempt-[0-9]{5}|rank-[0-9]{5}|digest|attribution|quarantine")
_OTHERS = re.compile(r"digest|attribution|quarantine|rank-(?!00000)[0-9]{5}")
_DEEPEST = 8  # folders that runs are looked for in
_MOST_FOLDERS = 20_000  # of runs, below one address

_SOON, _LATER = (
    1.0,
    20.0,
)  # seconds after which a folder is listed again: where something grows, and elsewhere
_PART = 3  # of the time between two listings of a folder, that they may take
_FIRST_WAIT, _LAST_WAIT = 2.0, 30.0  # seconds until a store that did not answer is asked again
_TOGETHER = 32 << 20  # bytes of files fetched at once


class Shadow:
    """What lies below an address, in the folder `root` of a cache."""

    def __init__(self, store: Store, cache: Cache):
        self.root = cache.root / store.key
        for part in store.root:
            self.root = self.root / part
        self._store, self._cache = store, cache
        self._below = self.root.relative_to(cache.root).as_posix()
        self._lock, self._fetching = threading.RLock(), threading.Lock()
        self._listed: dict[str, tuple[float, float]] = {}  # when a folder was, and how long that took
        self._runs: set[str] = set()
        self._trouble: tuple[datetime, str] | None = None
        self._ask_at, self._wait = 0.0, _FIRST_WAIT
        self.fetched = 0  # bytes, since this process began
        self.asked = 0  # requests

    def shown(self, path: Path) -> str:
        """The address of a path in here."""
        inner = path.relative_to(self.root).as_posix()
        return self._store.address.shown + ("" if inner == "." else f"/{inner}")

    @property
    def trouble(self) -> str:
        """A sentence, while the store does not answer."""
        if (trouble := self._trouble) is None:
            return ""
        since, why = trouble
        return f"{self._store.address.shown} has not answered since {since:%H:%M:%S} UTC ({why})."

    # What is there

    def find(self, folder: Path) -> None:
        """List what may hold runs, at or below a folder. Folders that are runs are not entered again."""
        with self._lock:
            level, wait = [self._inner(folder)], _SOON
            for _ in range(_DEEPEST):
                self._store.together(functools.partial(self._list, wait=wait), level)
                wait = 4 * _SOON
                below = []
                for each in level[:_MOST_FOLDERS]:
                    if (self._here(each) / MANIFEST).exists():
                        if each not in self._runs:
                            self._runs.add(each)
                        continue
                    below += [_join(each, name) for name in _folders(self._here(each))]
                level = [each for each in below if each not in self._runs or not self._known(each)]
                if not level:
                    return

    def look(self, run: Path) -> None:
        """Bring the folder of a run up to date."""
        with self._lock:
            self._look(self._inner(run), _SOON, 0)

    def signs(self, folder: Path) -> None:
        """Bring the small files of one folder up to date."""
        with self._lock:
            self._list(self._inner(folder), _SOON)

    def _look(self, folder: str, wait: float, depth: int) -> None:
        # What it says first, then what is there: in the other order a shard that came between would be missed.
        changed = self._list(folder, wait)
        names = [name for name in _folders(self._here(folder)) if _FOLDER.fullmatch(name)]
        last = max((name for name in names if name.startswith("attempt-")), default=None)
        # Of what has ended, or was continued, nothing grows.
        grows = wait == _SOON and (changed or not (self._here(folder) / END).exists()) and last is None
        for name in names if depth < 3 else ():
            inner = _join(folder, name)
            if name.startswith("attempt-") or name == "quarantine":
                self._look(inner, _SOON if name == last else _LATER, depth + 1)
                continue
            self._list(inner, _SOON if grows and not _OTHERS.fullmatch(name) else _LATER)
            if name.startswith("rank-") and (self._here(inner) / "digest").is_dir():
                self._list(_join(inner, "digest"), _LATER)

    def _known(self, run: str) -> bool:
        return (self._here(run) / MANIFEST).exists()

    def _list(self, folder: str, wait: float) -> bool:
        """List a folder, unless that was done `wait` seconds ago; whether something in it is new or gone."""
        now = time.monotonic()
        when, took = self._listed.get(folder, (-float("inf"), 0.0))
        if now - when < max(wait, _PART * took) or now < self._ask_at:
            return False
        try:
            self.asked += 1
            there = {each.name: each for each in self._store.list(folder)}
        except FileNotFoundError:
            there = {}
        except Unreachable as error:
            self._lost(error)
            return False
        self._answered()
        self._listed[folder] = time.monotonic(), time.monotonic() - now
        try:
            return self._take(folder, there)
        except (OSError, sqlite3.Error) as error:  # the cache's own disk
            self._trouble = datetime.now(UTC), f"the cache cannot be written: {printable(error)}"
            return False

    def _take(self, folder: str, there: dict[str, Listed]) -> bool:
        here, known = self._here(folder), self._cache.stamps(self._key(folder))
        files = {
            name: each
            for name, each in there.items()
            if not each.folder and (name in _SMALL or _LARGE.fullmatch(name))
        }
        if there:
            here.mkdir(parents=True, exist_ok=True)
        new, changed = [], False
        for name, each in files.items():
            # What is larger than anything that belongs there is refused by who reads it; its size is not believed here.
            most = _SMALL.get(name, shard.MOST_BYTES)
            size = min(each.size, most + 1)
            if known.get(name) == (size, each.stamp) and (here / name).exists():
                continue
            changed = True
            if name in _SMALL and size <= most:
                self._fetch_small(folder, each)
            else:
                new.append((self._key(_join(folder, name)), size, each.stamp))
        self._cache.place(new)
        folders = {name for name, each in there.items() if each.folder}
        for name in folders:
            (here / name).mkdir(exist_ok=True)
        gone = set(known) - set(files)
        if gone:
            self._cache.forget(self._key(_join(folder, name)) for name in gone)
        for name in set(_folders(here)) - folders:
            self._drop(_join(folder, name))
        return changed or bool(gone)

    def _fetch_small(self, folder: str, each: Listed) -> None:
        path = _join(folder, each.name)
        try:
            self.asked += 1
            content = self._store.read(path, 0, _SMALL[each.name] + 1) if each.size else b""
        except FileNotFoundError:
            return
        except Unreachable as error:
            self._doubt(folder, error)
            return
        self.fetched += len(content)
        write_whole(self._here(path), content, durable=False)
        self._cache.note(self._key(path), each.size, each.stamp)

    def _drop(self, folder: str) -> None:
        """A folder is gone, and all that was in it."""
        here = self._here(folder)
        for path, _, names in os.walk(here):
            inside = self._key(self._inner(Path(path)))
            self._cache.forget(f"{inside}/{name}" for name in names)
        shutil.rmtree(here, ignore_errors=True)
        for each in [each for each in self._listed if each == folder or each.startswith(f"{folder}/")]:
            del self._listed[each]
        self._runs.discard(folder)

    # What is in it

    def open(self, path: Path, most: int) -> BinaryIO:
        """A file, of which what is read is fetched; refuses as `careful.open_file` does."""
        name = path.name
        size = os.lstat(path).st_size
        if size > most:
            raise ValueError(f"is larger than the {most >> 20} MiB that belong there")
        if name in _SMALL:
            return open(path, "rb", buffering=0)
        return _Fetched(self, self._inner(path), size)

    def soon(self, paths: Iterable[Path]) -> None:
        """Fetch files that are about to be read, several at once."""
        wanted: list[tuple[str, int]] = []
        for path in paths:
            inner = self._inner(path)
            with contextlib.suppress(OSError, sqlite3.Error):
                size = os.lstat(path).st_size
                if size <= shard.MOST_BYTES and self._cache.missing(self._key(inner), 0, size) == [(0, size)]:
                    wanted.append((inner, size))
        while wanted and time.monotonic() >= self._ask_at:
            batch, total = [], 0
            while wanted and (not batch or total + wanted[0][1] <= _TOGETHER):
                batch.append(wanted.pop(0))
                total += batch[-1][1]
            if len(batch) < 2:
                continue  # who reads it fetches it as quickly
            self.asked += len(batch)
            with self._fetching:
                found = self._store.read_many(inner for inner, _ in batch)
            if not found:
                return
            for inner, content in found.items():
                self.fetched += len(content)
                with contextlib.suppress(OSError, sqlite3.Error):
                    self._cache.keep(self._key(inner), 0, content)

    def part(self, inner: str, start: int, stop: int) -> bytes:
        """Bytes of a file, from the cache or fetched into it. Raises OSError."""
        try:
            found = self._cached(inner, start, stop)
        except (Unreachable, FileNotFoundError):
            raise
        except (OSError, sqlite3.Error):  # a cache that keeps nothing, its disk being full
            found = None
        return self._range(inner, start, stop) if found is None else found

    def _cached(self, inner: str, start: int, stop: int) -> bytes | None:
        key = self._key(inner)
        if (found := self._cache.read(key, start, stop)) is not None:
            return found
        with self._fetching:  # what two ask for is fetched once
            found = self._cache.read(key, start, stop)
            for _ in range(3):  # another process may empty it meanwhile
                if found is not None:
                    return found
                for first, last in self._cache.missing(key, start, stop):
                    self._cache.keep(key, first, self._range(inner, first, last))
                found = self._cache.read(key, start, stop)
        return found  # None: of another version by now

    def _range(self, inner: str, start: int, stop: int) -> bytes:
        if time.monotonic() < self._ask_at and self._trouble is not None:
            raise Unreachable(f"it was not fetched yet, and the store does not answer: {self._trouble[1]}")
        try:
            self.asked += 1
            content = self._store.read(inner, start, stop)
        except Unreachable as error:
            self._doubt(inner.rpartition("/")[0], error)
            raise
        self._answered()
        self.fetched += len(content)
        return content

    # Whether the store answers

    def _lost(self, error: OSError) -> None:
        if self._trouble is None:
            self._trouble, self._wait = (datetime.now(UTC), printable(error)), _FIRST_WAIT
        self._ask_at = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LAST_WAIT)

    def _doubt(self, folder: str, error: OSError) -> None:
        """A file could not be read: is it the file, or the store?"""
        try:
            self._store.list(folder)
        except FileNotFoundError:
            pass
        except Unreachable:
            self._lost(error)

    def _answered(self) -> None:
        if self._trouble is not None:
            self._listed.clear()
        self._trouble, self._ask_at, self._wait = None, 0.0, _FIRST_WAIT

    # Names

    def _inner(self, path: Path) -> str:
        inner = path.relative_to(self.root).as_posix()
        return "" if inner == "." else inner

    def _here(self, inner: str) -> Path:
        parts = [part for part in inner.split("/") if part]
        if not all(map(safe, parts)):
            raise ValueError(f"no name of a file: {printable(inner)}")
        return self.root.joinpath(*parts)

    def _key(self, inner: str) -> str:
        return f"{self._below}/{inner}" if inner else self._below


class _Fetched(io.RawIOBase):
    """An open file of a shadow."""

    def __init__(self, shadow: Shadow, inner: str, size: int):
        super().__init__()
        self._shadow, self._inner, self.size, self._at = shadow, inner, size, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.size, self._at + size)
        if stop <= self._at:
            return b""
        content = self._shadow.part(self._inner, self._at, stop)
        self._at += len(content)
        return content


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
