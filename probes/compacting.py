"""Compact: make the digest of sealed shards (digest.py), so many of them a file; nothing else is written, no shard touched."""

import contextlib
import logging
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from probes.attempts import Attempt
from probes.careful import is_folder, read_bytes
from probes.digest import FOLDER, Covered, Digest, DigestError, Piece, write_digest
from probes.layout import Layout
from probes.manifest import Manifest
from probes.place import Place
from probes.shard import (
    MOST_BYTES,
    ShardError,
    parse_header,
    parse_shard,
    shard_name,
    shard_names,
    shard_steps,
)

log = logging.getLogger("depthscope")

ROWS = 1 << 15  # of one metric, in one file, or
BYTES = 64 << 20  # of shards

_PIECE = 64 << 10  # bytes of rows under one checksum, about
_ROOM = 4 * BYTES  # that a disk must have left for who writes behind a recording: the shards need it more
_LEFT_HOURS = 24  # after which a file that somebody began to write is nobody's


@dataclass
class _Group:
    """Shards that follow each other, as far as they have been read."""

    shards: list[Covered] = field(default_factory=list)
    steps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    bytes: int = 0
    rows: int = 0

    @property
    def full(self) -> bool:
        return self.bytes >= BYTES or self.rows >= ROWS

    def add(self, shard: Covered, rows: dict[str, tuple[np.ndarray, np.ndarray, int]]) -> None:
        """Rows by metric: steps, values [n, width] as they lie in the shard, and from which byte on."""
        for name, (steps, values, start) in rows.items():
            self.steps.setdefault(name, []).append(steps)
            self.values.setdefault(name, []).append(values)
            each = max(1, _PIECE // (values.shape[1] * values.itemsize))
            for at in range(0, len(values), each):
                piece = values[at : at + each]
                begin = start + at * values.shape[1] * values.itemsize
                self.pieces.setdefault(name, []).append(
                    Piece(len(self.shards), begin, len(piece), zlib.crc32(piece), values.itemsize)
                )
        self.shards.append(shard)
        self.bytes += shard.size
        self.rows = max(self.rows, *(sum(map(len, steps)) for steps in self.steps.values()))

    def write(self, into: Path, about: dict[str, str], rest: Callable[[], object]) -> Path:
        series = {
            name: (
                np.concatenate(steps),
                np.concatenate(self.values[name]).astype(np.float32, copy=False),
                self.pieces[name],
            )
            for name, steps in self.steps.items()
        }
        if not is_folder(into):
            into.mkdir()  # FileExistsError where it is a link: nothing is written outside the run
        path = into / shard_name(min(s.first for s in self.shards), max(s.last for s in self.shards))
        write_digest(path, about, self.shards, series, rest)
        return path


def compact(
    attempt: Attempt,
    layout: Layout,
    into: Path,
    whole: bool = True,
    rest: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Cover the shards of an attempt that no digest in `into` covers yet; each file's path, when it is there.

    Without `whole` shards that do not fill a file wait for more of them. A damaged shard is left out. `rest` is called
    between two shards and between two metrics. Raises OSError when the disk refuses.
    """
    digests = [*attempt.digests, *fitting(attempt, into)]
    covered = {name for digest in digests for name in digest.names}
    group = _Group()
    for name in shard_names(attempt.shards):
        rest()
        read = None if name in covered else _read(attempt, layout, name)
        if read is None:
            if group.shards and whole:
                yield group.write(into, attempt.about, rest)
            group = _Group()
            continue
        group.add(*read)
        if group.full:
            yield group.write(into, attempt.about, rest)
            group = _Group()
    if group.shards and whole:
        yield group.write(into, attempt.about, rest)


def kept(attempt: Attempt, layout: Layout, cache: Path) -> Path:
    """The folder in a cache with digests of an attempt; where it is long and has none of its own, they are made."""
    folder, names = (
        cache / f"attempt-{attempt.number:05d}-rank-{attempt.rank:05d}",
        shard_names(attempt.shards),
    )
    for place in (attempt.shards / FOLDER, folder):
        attempt.rely(names, place, layout)
    size = 0
    for name in names:
        if name not in attempt.sealed and name not in attempt.broken:
            with contextlib.suppress(OSError):
                size += os.lstat(attempt.shards / name).st_size
    if size >= BYTES:
        with contextlib.suppress(OSError):  # a full disk: then the shards are read
            cache.mkdir(parents=True, exist_ok=True)
            for _ in compact(attempt, layout, folder, whole=False):
                pass
    return folder


def fitting(attempt: Attempt, folder: Path) -> Iterator[Digest]:
    """The digests in a folder that are sound and of this attempt's shards."""
    for name in shard_names(folder):
        try:
            digest = Digest(folder / name, attempt.shards)
        except (DigestError, FileNotFoundError):
            continue
        if not digest.misfit(attempt.about):
            yield digest


class Behind:
    """The digest of a run while it is written: made when what was sealed since fills a file, by who has nothing else to do."""

    def __init__(self, place: Place, manifest: Manifest):
        self._place, self._manifest = place, manifest
        self._bytes = self._rows = 0

    def sealed(self, rows: Sequence[tuple[str, int, np.ndarray]]) -> None:
        """A shard of these rows was sealed."""
        count = Counter(name for name, _, _ in rows)
        self._rows += max(count.values(), default=0)
        self._bytes += sum(value.nbytes for _, _, value in rows)

    def work(self, rest: Callable[[], bool]) -> None:
        """Make what can be made. `rest` is called every few milliseconds; where it says False, the work is left for later.
        Never raises: a digest is no loss."""
        if self._bytes < BYTES and self._rows < ROWS:
            return
        before = self._bytes, self._rows
        self._bytes = self._rows = 0

        def rested() -> None:
            if not rest():
                raise _Enough

        try:
            place = self._place
            attempt = Attempt(place.run, place.number, self._manifest, place.rank, place.created)
            if shutil.disk_usage(attempt.shards).free < _ROOM:
                return
            for _ in compact(attempt, self._manifest.layout, attempt.shards / FOLDER, False, rested):
                pass
        except _Enough:
            self._bytes, self._rows = before
        except Exception as error:
            log.debug("depthscope made no digest of %s: %s", self._place.run, error)


class _Enough(Exception):
    pass


def tidy(attempt: Attempt, folder: Path) -> list[Path]:
    """Remove the digests that readers would pass over, and what killed writers left; the paths of the digests."""
    if is_folder(folder):
        for entry in os.scandir(folder):
            old = time.time() - entry.stat(follow_symlinks=False).st_mtime > 3600 * _LEFT_HOURS
            if (
                entry.name.startswith(".")
                and ".tmp-" in entry.name
                and old
                and entry.is_file(follow_symlinks=False)
            ):
                os.unlink(entry.path)
    sound = {digest.path for digest in fitting(attempt, folder)}
    gone = [folder / name for name in shard_names(folder) if folder / name not in sound]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def _read(attempt: Attempt, layout: Layout, name: str) -> tuple[Covered, dict] | None:
    """A shard and the rows in it; None for one that has to be read by itself."""
    try:
        data = read_bytes(attempt.shards / name, MOST_BYTES)
        shard = parse_shard(data)
        known = attempt.rows(name, shard, layout)
        places, _ = parse_header(data, len(data))
    except (ShardError, ValueError, OSError):
        return None
    first, last = shard_steps(name)
    if shard_name(first, last) != name:
        return None
    rows = {}
    for each, (steps, values) in known.items():
        if not len(steps):
            continue
        if not values.size:
            return None
        values = shard.tensors[each].reshape(len(steps), -1)
        rows[each] = shard.tensors[f"{each}.step"], values, places[each].start
    if not rows:
        return None
    covered = Covered(first, last, len(data), shard.number, int(shard.crc32, 16))
    return covered, rows
