"""Write one shard, read one shard: a sealed safetensors file that is complete or not there at all.

A shard holds `<metric>` [n, ...] and `<metric>.step` int64 [n] for each metric. safetensors checks lengths
but not content, so the metadata carries a CRC-32 over names, shapes and bytes.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import numpy as safetensors_numpy

from probes.careful import is_folder, open_file, printable, read_at, size_of
from probes.whole import write_whole

SUFFIX = ".safetensors"
MOST_BYTES = 1 << 30  # a writer seals far less at once
MOST_HEADER = 16 << 20
_AT_ONCE = 64 << 20  # bytes that are read before anything of them is looked at
_MOST_AXES = 16
_UNSUMMED = "has no checksum, so depthscope did not write it"

_NAME = re.compile(r"([0-9]{12,16})-([0-9]{12,16})\.safetensors")
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


class ShardError(Exception):
    """A shard that cannot be trusted; the message says why in one clause."""


class UnreadableShard(ShardError):
    """A shard that may well be sound, but cannot be read now."""


def shard_name(first: int, last: int) -> str:
    return f"{first:012d}-{last:012d}{SUFFIX}"


def shard_steps(name: str) -> tuple[int, int] | None:
    """First and last step from a shard's file name, or None for a name that is not a shard's."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def shard_names(folder: Path) -> list[str]:
    """Names of the shards (or of the files of a digest) in a folder, in order; none where there is no such folder."""
    if not is_folder(folder):
        return []
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)]
    except OSError:
        return []
    return sorted(name for name in names if shard_steps(name) is not None)


@dataclass(frozen=True)
class Shard:
    """What a shard holds, checked: tensors by name, and the metadata without the checksum, which is `crc32`."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    size: int
    crc32: str = ""

    @property
    def number(self) -> int:
        """Which shard of its attempt it is, -1 where it does not say."""
        number = self.metadata.get("shard", "")
        return int(number) if re.fullmatch("[0-9]{1,9}", number) else -1


def write_shard(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], durable: bool = True
) -> int:
    """Seal `tensors` at `path`: temporary file, fsync, rename, fsync of the folder (not `durable`: no fsync). Returns its size.

    Raises OSError when the disk refuses, FileExistsError when the shard is there already (a shard is never
    rewritten).
    """
    if path.exists():
        raise FileExistsError(f"shard {path} exists already")
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    data = safetensors_numpy.save(content, {**metadata, "crc32": checksum(content, metadata)})
    write_whole(path, data, durable)
    if durable:
        sync_folder(path.parent)
    return len(data)


def read_shard(path: Path) -> Shard:
    """A whole shard, checked. Raises ShardError (broken) or FileNotFoundError (gone)."""
    # Not mapped into memory: a file that shrinks meanwhile would kill the process.
    try:
        with open_file(path, MOST_BYTES) as file:
            if size_of(file) > _AT_ONCE:
                _look(file)
                file.seek(0)
            data = file.read(size_of(file))
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ShardError(str(error)) from error
    except OSError as error:
        raise UnreadableShard(f"cannot be read ({error.strerror or error})") from error
    return parse_shard(data)


def _look(file: BinaryIO) -> None:
    """Raises ShardError where the header of a shard alone says that it is none: before a gigabyte is read."""
    try:
        _, metadata = read_header(file)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _incomplete(error) from error
    if "crc32" not in metadata:
        raise ShardError(_UNSUMMED)


def parse_shard(data: bytes) -> Shard:
    """A shard from the bytes of its file. Raises ShardError."""
    try:
        tensors, metadata = _parse(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _incomplete(error) from error
    claimed = metadata.pop("crc32", None)
    if claimed is None:
        raise ShardError(_UNSUMMED)
    if claimed != checksum(tensors, metadata):
        raise ShardError("does not match its checksum: its content changed after it was written")
    return Shard(tensors, metadata, len(data), claimed)


def _incomplete(error: Exception) -> ShardError:
    return ShardError(f"is not a complete safetensors file ({printable(error)})")


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, of which every byte must have its place."""
    places, metadata = parse_header(data, len(data))
    tensors = {
        name: np.frombuffer(data, place.dtype, math.prod(place.shape), place.start).reshape(place.shape)
        for name, place in places.items()
    }
    return tensors, metadata


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: from byte `start` on."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> tuple[dict[str, Place], dict[str, str]]:
    """As `parse_header`, of an open file of which nothing else is read."""
    length = int.from_bytes(read_at(file, 0, 8), "little")
    if length > MOST_HEADER:
        raise ValueError("its header is not JSON")
    return parse_header(read_at(file, 0, 8 + length), size_of(file))


def parse_header(data: bytes, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Places and metadata by the header of a safetensors file of `size` bytes, of which every byte must have its place.

    `data` is the file's beginning, with all of the header. Raises ValueError, TypeError, KeyError or RecursionError.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise ValueError("it ends within its header")
    if start > MOST_HEADER or data[8:9] != b"{":
        raise ValueError("its header is not JSON")
    header = json.loads(data[8:start].decode(), object_pairs_hook=_distinct)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not strings")
    for text in (*metadata, *metadata.values(), *header):
        text.encode()  # half a character cannot be summed
    places, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its entry for {name!r} is another's")
        (first, last), shape, dtype = entry["data_offsets"], entry["shape"], np.dtype(_TYPES[entry["dtype"]])
        # Few and small numbers: the product of a million large ones would take for ever.
        if len(shape) > _MOST_AXES or not all(
            type(number) is int and 0 <= number < 1 << 62 for number in (first, last, *shape)
        ):
            raise ValueError(f"its entry for {name!r} has other numbers than sizes")
        if first != at or last - first != math.prod(shape) * dtype.itemsize or start + last > size:
            raise ValueError(f"it has no room for {name!r}")
        places[name] = Place(start + first, dtype, tuple(shape))
        at = last
    if start + at != size:
        raise ValueError("it holds more than its header says")
    return places, metadata


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header says something twice")
    return found


def checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """CRC-32, eight hex digits, over the metadata (without crc32) and every tensor, both in order of name.

    Each metadata entry contributes `key=value\\n`; each tensor `name dtype shape\\n` (dtype as numpy's
    `float32`, shape as `3x4`) and then its bytes, little-endian, row-major.
    """
    crc = 0
    for key in sorted(metadata):
        crc = zlib.crc32(f"{key}={metadata[key]}\n".encode(), crc)
    for name in sorted(tensors):
        value = tensors[name]
        crc = zlib.crc32(f"{name} {name_of(value.dtype)} {'x'.join(map(str, value.shape))}\n".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(value).data, crc)
    return f"{crc:08x}"


@cache
def name_of(dtype: np.dtype) -> str:
    # Numpy makes it anew each time, which takes longer than summing a small tensor.
    return dtype.name


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; file systems that cannot sync a folder are left as they are."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
