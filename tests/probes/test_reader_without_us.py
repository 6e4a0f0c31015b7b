"""A reader from docs/run-format.md alone, without numpy, safetensors or probes, agrees with ours."""

import array
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import probes
from tests.probes.models import decoder, sgd, train

DOCUMENT = Path(__file__).parents[2] / "docs" / "run-format.md"
CODES = {"F32": ("f", "float32"), "I64": ("q", "int64")}


class Shard:
    """One shard: its metadata, and tensors as (shape, flat list of numbers)."""

    def __init__(self, data: bytes):
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.tensors, self.crc = {}, 0
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

    def _add(self, content: bytes) -> None:
        self.crc = zlib.crc32(content, self.crc)

    @property
    def sound(self) -> bool:
        return f"{self.crc:08x}" == self.metadata["crc32"]


def read(folder: Path) -> dict[str, list[tuple[int, list[float]]]]:
    """Rows (step, numbers) of every metric of a run."""
    metrics = {}
    for path in sorted((folder / "rank-00000").iterdir()):
        if not re.fullmatch(r"\d+-\d+\.safetensors", path.name):
            continue
        shard = Shard(path.read_bytes())
        assert shard.sound
        for name, (shape, numbers) in shard.tensors.items():
            if name.endswith(".step"):
                continue
            _, steps = shard.tensors[name + ".step"]
            width = math.prod(shape[1:])
            rows = [numbers[i * width : (i + 1) * width] for i in range(len(steps))]
            metrics.setdefault(name, []).extend(zip(steps, rows, strict=True))
    return {name: sorted(rows, key=lambda row: row[0]) for name, rows in metrics.items()}


def unpacked(cells: list[float], manifest: dict) -> list[list[float]]:
    """A packed triangle as rows of sources, blank where there is none."""
    return rows_of(cells, [read["sources"] for read in manifest["layout"]["reads"]])


def rows_of(cells: list[float], lengths: list[int]) -> list[list[float]]:
    cells = iter(cells)
    return [
        [next(cells) if column < length else math.nan for column in range(max(lengths))] for length in lengths
    ]


@pytest.mark.parametrize("kind", ["prenorm", "full", "block of 4, ragged"])
def test_an_independent_reader_agrees(kind, tmp_path):
    model = decoder(kind)
    optimizer = sgd(model)
    path = tmp_path / "run"
    with probes.record(model, path, optimizer=optimizer, every=2, matrices_every=3) as recorder:
        train(model, optimizer, 7, after=lambda loss: recorder.log(loss=loss))
    run, found = probes.open_run(path), read(path)
    assert sorted(found) == run.metrics
    manifest = json.loads((path / "run.json").read_text())
    assert manifest["format"] == 1
    for name, rows in found.items():
        assert [step for step, _ in rows] == run.steps(name).tolist()
        values = [row for _, row in rows]
        if name in ("depth_weight", "depth_weight_std", "contribution_rms"):
            values = [unpacked(cells, manifest) for cells in values]
        if name in ("mixing_weight", "mixing_share"):
            states = range(1, len(manifest["layout"]["layers"]) + 2)
            values = [rows_of(cells, list(states)) for cells in values]
        ours = run[name]
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(ours.shape), ours)
    assert run.steps("loss").tolist() == list(range(7))
    assert run.steps("hidden_rms").tolist() == [0, 2, 3, 4, 6]
    assert json.loads((path / "end.json").read_text())["status"] == "finished"


def test_a_changed_number_does_not_pass_the_independent_checksum(tmp_path):
    model = decoder("full")
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(model, optimizer, 1)
    (path,) = (tmp_path / "run" / "rank-00000").iterdir()
    content = bytearray(path.read_bytes())
    assert Shard(bytes(content)).sound
    content[-1] ^= 1
    assert not Shard(bytes(content)).sound


# The worked example of the documentation


def example() -> str:
    return DOCUMENT.read_text(encoding="utf-8").partition("## A worked example")[2]


def test_the_documented_checksum_and_triangle_are_right():
    text = example()
    hexdump = re.search(r"```hex\n(.*?)```", text, re.DOTALL).group(1)
    shard = Shard(bytes.fromhex(re.sub(r"#.*", "", hexdump)))
    assert shard.sound
    assert f"`{shard.metadata['crc32']}`" in text
    shape, cells = shard.tensors["depth_weight"]
    assert shape == [1, 6] and cells == [1, 0.75, 0.25, 0.5, 0.25, 0.25]
    assert shard.tensors["depth_weight.step"] == ([1], [100])
    layout = {"layout": {"reads": [{"sources": n} for n in (1, 2, 3)], "sources": [0, 1, 2]}}
    rows = [" ".join("–" if math.isnan(x) else f"{x:g}" for x in row) for row in unpacked(cells, layout)]
    assert "\n".join(f"    {row}" for row in rows) in text


def test_our_reader_accepts_the_documented_shard(tmp_path):
    from probes.shard import read_shard

    hexdump = re.search(r"```hex\n(.*?)```", example(), re.DOTALL).group(1)
    path = tmp_path / "000000000100-000000000100.safetensors"
    path.write_bytes(bytes.fromhex(re.sub(r"#.*", "", hexdump)))
    assert read_shard(path)["depth_weight"].tolist() == [[1, 0.75, 0.25, 0.5, 0.25, 0.25]]


def test_every_field_and_metric_is_documented(tmp_path):
    from probes.vocabulary import METRICS

    text = DOCUMENT.read_text(encoding="utf-8")
    model = decoder("block of 2")
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(model, optimizer, 1)
    fields = set()
    for name in ("run.json", "heartbeat.json", "end.json"):
        content = json.loads((tmp_path / "run" / name).read_text())
        fields |= set(content) | (set(content.get("versions", ())))
        for rows in content.get("layout", {}).items():
            fields |= {rows[0], *rows[1][0]}
    missing = [name for name in sorted(fields | set(METRICS)) if f"`{name}`" not in text]
    assert not missing
