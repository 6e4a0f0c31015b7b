"""Write one shard, read one shard: a sealed safetensors file that is complete or not there at all.

A shard holds `<metric>` [n, ...] and `<metric>.step` int64 [n] for each metric. safetensors checks lengths
but not content, so the metadata carries a CRC-32 over names, shapes and bytes.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

SUFFIX = ".safetensors"


class ShardError(Exception):
    """A shard that cannot be trusted; the message says why in one clause."""


def shard_name(first: int, last: int) -> str:
    return f"{first:012d}-{last:012d}{SUFFIX}"


def shard_steps(name: str) -> tuple[int, int] | None:
    """First and last step from a shard's file name, or None for a name that is not a shard's."""
    first, dash, last = name.removesuffix(SUFFIX).partition("-")
    if not name.endswith(SUFFIX) or not dash or not (first.isdecimal() and last.isdecimal()):
        return None
    return int(first), int(last)


def write_shard(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Seal `tensors` at `path`: temporary file, fsync, rename, fsync of the folder. Returns its size.

    Raises OSError when the disk refuses, FileExistsError when the shard is there already (a shard is never
    rewritten).
    """
    if path.exists():
        raise FileExistsError(f"shard {path} exists already")
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    data = safetensors_numpy.save(content, {**metadata, "crc32": checksum(content, metadata)})
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return len(data)


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a shard, checked. Raises ShardError (broken) or FileNotFoundError (gone)."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"is not a complete safetensors file ({error})") from error
    claimed = metadata.pop("crc32", None)
    if claimed is None:
        raise ShardError("has no checksum, so depthscope did not write it")
    if claimed != checksum(tensors, metadata):
        raise ShardError("does not match its checksum: its content changed after it was written")
    return tensors


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
        crc = zlib.crc32(f"{name} {value.dtype.name} {'x'.join(map(str, value.shape))}\n".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(value).data, crc)
    return f"{crc:08x}"


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
