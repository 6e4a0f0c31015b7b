"""A reader of runs from docs/run-format.md alone, as one would write it in another language: no numpy, no safetensors,
nothing of ours. It judges what our writer leaves behind."""

import array
import json
import math
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

CODES = {"F32": ("f", "float32"), "I64": ("q", "int64")}


class Shard:
    """One shard: its metadata, and tensors as (shape, flat list of numbers)."""

    def __init__(self, data: bytes):
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.tensors, self.crc, place = {}, 0, 0
        for key in sorted(self.metadata, key=str.encode):
            if key != "crc32":
                self._add(f"{key}={self.metadata[key]}\n".encode())
        for name in sorted(header, key=str.encode):
            start, end = header[name]["data_offsets"]
            content = data[8 + length + start : 8 + length + end]
            code, dtype = CODES[header[name]["dtype"]]
            shape = header[name]["shape"]
            self._add(f"{name} {dtype} {'x'.join(map(str, shape))}\n".encode())
            self._add(content)
            numbers = array.array(code, content)
            if sys.byteorder == "big":
                numbers.byteswap()
            assert len(numbers) == math.prod(shape)
            self.tensors[name] = shape, list(numbers)
            place = max(place, end)
        assert 8 + length + place == len(data)

    def _add(self, content: bytes) -> None:
        self.crc = zlib.crc32(content, self.crc)

    @property
    def sound(self) -> bool:
        return f"{self.crc:08x}" == self.metadata["crc32"]


def small_file(path: Path) -> dict:
    """run.json, attempt.json, heartbeat.json or end.json, checked as far as they carry a checksum."""
    content = path.read_bytes()
    data = json.loads(content)
    if "crc32" in data:
        before = content[: content.rindex(b'"crc32"')]
        assert data["crc32"] == f"{zlib.crc32(before):08x}"
    return data


def attempts(run: Path) -> list[tuple[int, Path]]:
    """First step and folder of each attempt, in order."""
    found = [(small_file(run / "run.json").get("step", 0), run)]
    for folder in sorted(run.iterdir()):
        if re.fullmatch(r"attempt-\d{5}", folder.name) and (folder / "attempt.json").exists():
            found.append((small_file(folder / "attempt.json")["step"], folder))
    return found


def shards(folder: Path) -> list[Path]:
    """The shards of one attempt, in order."""
    names = sorted((folder / "rank-00000").iterdir())
    return [path for path in names if re.fullmatch(r"\d{12,}-\d{12,}\.safetensors", path.name)]


def read(run: Path) -> dict[str, list[tuple[int, list[float]]]]:
    """Rows (step, numbers) of every metric of a run, in order of their steps. AssertionError where a file is unsound."""
    metrics, begun = {}, attempts(run)
    for place, (_, folder) in enumerate(begun):
        limit = min((step for step, _ in begun[place + 1 :]), default=math.inf)
        for path in shards(folder):
            shard = Shard(path.read_bytes())
            assert shard.sound, path
            if (of := shard.metadata.get("run")) is not None:
                assert float(of) == small_file(run / "run.json")["created"], path
            for name, (shape, numbers) in shard.tensors.items():
                if name.endswith(".step"):
                    continue
                _, steps = shard.tensors[name + ".step"]
                width = math.prod(shape[1:])
                rows = [numbers[i * width : (i + 1) * width] for i in range(len(steps))]
                shown = [(step, row) for step, row in zip(steps, rows, strict=True) if step < limit]
                if shown:
                    metrics.setdefault(name, []).extend(shown)
    return {name: sorted(rows, key=lambda row: row[0]) for name, rows in metrics.items()}


def unpacked(cells: list[float], manifest: dict) -> list[list[float]]:
    """A packed triangle as rows of sources, blank where there is none."""
    return rows_of(cells, [read["sources"] for read in manifest["layout"]["reads"]])


def rows_of(cells: list[float], lengths: Sequence[int]) -> list[list[float]]:
    cells = iter(cells)
    return [
        [next(cells) if column < length else math.nan for column in range(max(lengths))] for length in lengths
    ]
