"""Digest: what lets a long run be read in an instant, one file for each stretch of it. Made from shards, never trusted
beyond them: a digest that is gone, damaged or of other shards costs time and nothing else.

A file covers shards that follow each other. It says where in them the rows of each metric lie, with a checksum of every
piece, and holds their steps and the pyramid of their values (pyramid.py), column by column.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors_numpy

from probes import pyramid
from probes.careful import legible, open_file, printable, read_at
from probes.pyramid import Bins
from probes.shard import MOST_BYTES, Place, name_of, read_header, shard_name
from probes.vocabulary import MOST_STEP
from probes.whole import write_whole

FOLDER = "digest"
VERSION = "1"

_CHUNK = 64 << 10  # bytes under one checksum
_CRC = "crc"
_FLOATS = {2: "<f2", 4: "<f4", 8: "<f8"}  # by the bytes of a number
_KINDS = {
    "shards": "int64", "steps": "int64", "order": "int64", "pieces": "int64", "level": "float32", "nonfinite": "int32",
    "values": "float32", _CRC: "uint32",
}  # fmt: skip

# What a stranger's may say at most. Compacting takes 64 MiB of shards for a file, and the rest of the last of them.
_MOST_SHARDS = 1_000_000
_MOST_COVERED = MOST_BYTES + (256 << 20)


class DigestError(Exception):
    """A digest, or a piece of a shard it names, that cannot be trusted; the message says why in one clause."""


@dataclass(frozen=True)
class Piece:
    """Rows of a metric that lie together: in which of the shards, from which byte on, how many, of `item` bytes a number."""

    shard: int
    start: int
    rows: int
    crc32: int
    item: int


@dataclass(frozen=True)
class Covered:
    """A shard by its first and last step, size, number (-1: none) and checksum."""

    first: int
    last: int
    size: int
    number: int
    crc32: int

    @property
    def name(self) -> str:
        return shard_name(self.first, self.last)


@dataclass(frozen=True)
class Column:
    """What a digest knows of one metric: `rows` of `width` numbers, their steps in tensor `steps`, from `first` to `last`."""

    rows: int
    width: int
    steps: str
    first: int
    last: int


def write_digest(
    path: Path,
    about: dict[str, str],
    shards: Sequence[Covered],
    series: dict[str, tuple[np.ndarray, np.ndarray, Sequence[Piece]]],
    rest: Callable[[], object] = lambda: None,
) -> int:
    """Write one file; `series` has for each metric steps [n], values [n, width] as they lie in the pieces. Returns its size.
    `rest` is called every now and then: who has better things to do does them then.

    Raises OSError when the disk refuses; the file is whole or not there.
    """
    tensors: dict[str, np.ndarray] = {}
    told: dict[str, dict] = {}
    known: list[np.ndarray] = []
    for name, (steps, values, pieces) in series.items():
        rest()
        if (steps[1:] < steps[:-1]).any():
            order = np.argsort(steps, kind="stable")
            tensors[f"order.{name}"] = order
            steps, values = steps[order], values[order]
        at = next((i for i, other in enumerate(known) if np.array_equal(other, steps)), len(known))
        if at == len(known):
            known.append(steps)
            tensors[f"steps.{at}"] = np.ascontiguousarray(steps, np.int64)
        told[name] = {
            "rows": len(steps),
            "width": values.shape[1],
            "steps": f"steps.{at}",
            "first": int(steps[0]),
            "last": int(steps[-1]),
        }
        table = [(each.shard, each.start, each.rows, each.crc32, each.item) for each in pieces]
        tensors[f"pieces.{name}"] = np.array(table, np.int64)
        if values.shape[1] == 1:  # a scalar is read as a whole, by those who match runs
            tensors[f"values.{name}"] = np.ascontiguousarray(values[:, 0], np.float32)
        for level, bins in enumerate(pyramid.levels(values), 1):
            three = np.stack([bins.low, bins.mean, bins.high], axis=1).transpose(2, 1, 0)
            tensors[f"level.{level}.{name}"] = np.ascontiguousarray(three, np.float32)
            if bins.nonfinite.any():
                tensors[f"nonfinite.{level}.{name}"] = np.ascontiguousarray(bins.nonfinite.T, np.int32)
    covered = [(each.first, each.last, each.size, each.number, each.crc32) for each in shards]
    tensors["shards"] = np.array(covered, np.int64)
    sums = [
        zlib.crc32(memoryview(tensors[name]).cast("B")[start : start + _CHUNK])
        for name in sorted(tensors)
        for start in range(0, tensors[name].nbytes, _CHUNK)
    ]
    tensors[_CRC] = np.array(sums, np.uint32)
    metadata = {**about, "digest": VERSION, "metrics": json.dumps(told, sort_keys=True)}
    places = {
        name: Place(0, tensor.dtype.newbyteorder("<"), tensor.shape) for name, tensor in tensors.items()
    }
    metadata["crc32"] = _checksum(metadata, places, tensors[_CRC].tobytes())
    content = safetensors_numpy.save(tensors, metadata)
    rest()
    write_whole(path, content, durable=False)
    return len(content)


def _checksum(metadata: dict[str, str], places: dict[str, Place], sums: bytes) -> str:
    """CRC-32 of what stands in the header and of the table of sums."""
    crc = 0
    for key in sorted(metadata):
        crc = zlib.crc32(f"{key}={metadata[key]}\n".encode(), crc)
    for name in sorted(places):
        shape = "x".join(map(str, places[name].shape))
        crc = zlib.crc32(f"{name} {name_of(places[name].dtype)} {shape}\n".encode(), crc)
    return f"{zlib.crc32(sums, crc):08x}"


class Digest:
    """One file of a digest, and the folder of the shards it covers. Its header is read and checked when it is opened, the
    rest when it is asked for; nothing of it stays in memory but the places of things."""

    def __init__(self, path: Path, folder: Path):
        """Raises DigestError for a file that cannot be trusted, FileNotFoundError when it is gone."""
        self.path, self.folder = path, folder
        try:
            with open_file(path, MOST_BYTES) as file:
                self._read_header(file)
        except FileNotFoundError:
            raise
        except DigestError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DigestError(f"is not a complete digest ({printable(error)})") from error
        except OSError as error:
            raise DigestError(f"cannot be read ({error.strerror or error})") from error

    def _read_header(self, file) -> None:
        self._places, metadata = read_header(file)
        claimed = metadata.pop("crc32", None)
        sums = self._places[_CRC]
        content = read_at(file, sums.start, sums.size)
        if claimed != _checksum(metadata, self._places, content):
            raise DigestError("does not match its checksum: its header was changed after it was written")
        if metadata.get("digest") != VERSION:
            raise DigestError("is of another depthscope")
        self._sums, self._sum_of, at = np.frombuffer(content, "<u4"), {}, 0
        for name in sorted(self._places):
            if name != _CRC:
                self._sum_of[name] = at
                at += -(-self._places[name].size // _CHUNK)
        if at != len(self._sums):
            raise ValueError("it has not a checksum for each part")
        self.about = {key: value for key, value in metadata.items() if key not in ("digest", "metrics")}
        for name, place in self._places.items():
            if name_of(place.dtype) != _KINDS.get(name.partition(".")[0], name_of(place.dtype)):
                raise ValueError(f"its {name!r} are of another type")
        self._read_shards(file)
        self.metrics = {
            name: self._column(name, told) for name, told in json.loads(metadata["metrics"]).items()
        }
        # Each row has a step and numbers of two bytes at least: what is read can be no more than the shards hold.
        least = sum(told.rows * (8 + 2 * told.width) for told in self.metrics.values())
        if least > sum(shard.size for shard in self.shards):
            raise ValueError("it has more rows than its shards have room for")

    def _read_shards(self, file) -> None:
        if self._places["shards"].shape[:1] > (_MOST_SHARDS,):
            raise ValueError("it covers more shards than any")
        self.shards = [Covered(*map(int, row)) for row in self._tensor("shards", file, (None, 5))]
        self.names = [shard.name for shard in self.shards]
        if self.names != sorted(set(self.names)) or any(shard.size < 0 for shard in self.shards):
            raise ValueError("it covers shards twice, or in another order than theirs")
        if sum(shard.size for shard in self.shards) > _MOST_COVERED:
            raise ValueError("it covers more bytes than any")

    def _column(self, name: str, told: dict) -> Column:
        """What it says of one metric, checked against the shapes of its tensors."""
        column = Column(**told)
        if not legible(name):
            raise ValueError("it has a metric with a name that nobody can read")
        numbers = column.rows, column.width, column.first, column.last
        if (
            not all(type(n) is int and 0 <= n <= MOST_STEP for n in numbers)
            or not column.rows
            or not column.width
        ):
            raise ValueError(f"{name!r} has other numbers than sizes")
        if column.first > column.last or self._places[column.steps].shape != (column.rows,):
            raise ValueError(f"{name!r} has not a step for each row")
        for level in range(1, pyramid.depth(column.rows) + 1):
            shape = (column.width, 3, pyramid.size(column.rows, level))
            if self._places[f"level.{level}.{name}"].shape != shape:
                raise ValueError(f"{name!r} has another pyramid than rows")
        return column

    def misfit(self, about: dict[str, str]) -> str:
        """What sets it apart from the shards beside it, in a clause; empty where it is theirs. They are not read for that."""
        for key, value in about.items():
            if self.about.get(key) != value:
                return f"is of another {key}"
        below = os.path.join(self.folder, "")
        for name, shard in zip(self.names, self.shards, strict=True):
            try:
                size = os.lstat(below + name).st_size
            except OSError:
                return f"covers shard {name}, which is gone"
            if size != shard.size:
                return f"covers another shard {name} than the one that is there"
        return ""

    def verify(self) -> None:
        """Read every byte of the file. Raises DigestError."""
        for name in self._places:
            if name != _CRC:
                self._tensor(name)

    # What it holds

    def steps(self, name: str) -> np.ndarray:
        """int64 [rows], ascending."""
        told = self.metrics[name]
        steps = self._tensor(told.steps)
        if (steps[1:] < steps[:-1]).any():
            raise DigestError("holds steps that are not in order")
        if (steps[0], steps[-1]) != (told.first, told.last):
            raise DigestError("holds other steps than it says")
        return steps

    def values(self, name: str, index: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, width]: the rows `index`, or all, as they are stored."""
        told = self.metrics[name]
        index = np.arange(told.rows) if index is None else np.asarray(index, np.int64)
        if f"values.{name}" in self._places and told.width == 1:
            return self._tensor(f"values.{name}", shape=(told.rows,))[index][:, None]
        if f"order.{name}" in self._places:
            index = self._tensor(f"order.{name}", shape=(told.rows,))[index]
        table = self._tensor(f"pieces.{name}", shape=(None, 5))
        rows = table[:, 2]
        if ((rows < 1) | (rows > told.rows)).any() or rows.sum() != told.rows:
            raise DigestError("has pieces of other rows than it says")
        if len(index) and not 0 <= index.min() <= index.max() < told.rows:
            raise DigestError("has other rows than it says")
        ends = np.cumsum(rows)
        found = np.empty((len(index), told.width), np.float32)
        at = np.searchsorted(ends, index, side="right")
        order = np.argsort(at, kind="stable")
        bounds = np.flatnonzero(np.diff(at[order])) + 1
        file, opened = None, None
        try:
            for these in np.split(order, bounds) if len(order) else ():
                number = at[these[0]]
                piece = Piece(*map(int, table[number]))
                if opened != piece.shard:
                    if file is not None:
                        file.close()
                    file, opened = self._open_shard(piece.shard), piece.shard
                together = self._piece(file, piece, told.width)
                found[these] = together[index[these] - (ends[number] - piece.rows)]
        finally:
            if file is not None:
                file.close()
        return found

    def bins(self, name: str, level: int, start: int, stop: int, columns: np.ndarray | None) -> Bins:
        """The bins `start` to `stop` of a level; level 0 are the rows. `columns` int [k], None for all."""
        told = self.metrics[name]
        if not level:
            values = self.values(name, np.arange(start, stop))
            return pyramid.of_rows(values if columns is None else values[:, columns])
        rows, key = told.rows, f"level.{level}.{name}"
        shape = (told.width, 3, pyramid.size(rows, level))
        if columns is None or 4 * len(columns) > told.width:
            three = self._tensor(key, shape=shape)[:, :, start:stop]
            three = three if columns is None else three[columns]
        else:
            size = 3 * shape[2]
            three = np.stack([self._range(key, c * size, size).reshape(3, -1) for c in columns])[
                :, :, start:stop
            ]
        low, mean, high = (three[:, part].T for part in range(3))
        bad = np.zeros(low.shape, np.int32)
        if (lost := f"nonfinite.{level}.{name}") in self._places:
            bad = self._tensor(lost, shape=(told.width, shape[2]))[:, start:stop]
            bad = (bad if columns is None else bad[columns]).T
        each = pyramid.FACTOR**level
        count = np.full(stop - start, each, np.int64)
        if stop == shape[2]:
            count[-1] = rows - each * (stop - 1)
        return Bins(count, low, mean, high, bad)

    # Bytes

    def _open_shard(self, number: int):
        try:
            if not 0 <= number < len(self.shards):
                raise ValueError("it names a shard that it does not cover")
            return open_file(self.folder / self.shards[number].name, MOST_BYTES)
        except (OSError, ValueError) as error:
            raise DigestError(f"covers a shard that cannot be read ({printable(error)})") from error

    def _piece(self, file, piece: Piece, width: int) -> np.ndarray:
        if piece.item not in _FLOATS or min(piece.start, piece.rows) < 0:
            raise DigestError("has a piece of no shape")
        try:
            content = read_at(file, piece.start, self._bounded(piece.rows * width * piece.item))
        except (OSError, ValueError) as error:
            raise DigestError(f"covers a shard that cannot be read ({printable(error)})") from error
        if zlib.crc32(content) != piece.crc32:
            raise DigestError("covers a shard that was changed since")
        return np.frombuffer(content, _FLOATS[piece.item]).reshape(piece.rows, width)

    def _bounded(self, size: int) -> int:
        if size > MOST_BYTES:
            raise ValueError("it has a piece larger than any shard")
        return size

    def _tensor(self, name: str, file=None, shape: tuple | None = None) -> np.ndarray:
        place = self._places.get(name)
        if place is None:
            raise DigestError(f"has no {printable(name)}")
        if shape is not None and (
            len(shape) != len(place.shape)
            or any(want not in (None, have) for want, have in zip(shape, place.shape, strict=True))
        ):
            raise DigestError(f"holds {printable(name)} in another shape")
        return self._range(name, 0, math.prod(place.shape), file).reshape(place.shape)

    def _range(self, name: str, first: int, count: int, file=None) -> np.ndarray:
        """Numbers of a tensor, checked by the chunks they lie in."""
        if file is None:
            try:
                with open_file(self.path, MOST_BYTES) as own:
                    return self._range(name, first, count, own)
            except (OSError, ValueError) as error:
                raise DigestError(f"cannot be read ({printable(error)})") from error
        place = self._places[name]
        item = place.dtype.itemsize
        start, stop = first * item, (first + count) * item
        chunk = start // _CHUNK
        begin, end = chunk * _CHUNK, min(-(-stop // _CHUNK) * _CHUNK, place.size)
        content = memoryview(read_at(file, place.start + begin, max(0, end - begin)))
        for number, at in enumerate(range(0, len(content), _CHUNK), self._sum_of[name] + chunk):
            if zlib.crc32(content[at : at + _CHUNK]) != self._sums[number]:
                raise DigestError("does not match its checksum: its content changed after it was written")
        return np.frombuffer(content[start - begin : stop - begin], place.dtype)
