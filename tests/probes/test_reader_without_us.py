"""A reader from docs/run-format.md alone, without numpy, safetensors or probes, agrees with ours."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import probes
from tests.probes import plain_reader
from tests.probes.models import decoder, sgd, train
from tests.probes.plain_reader import Shard, rows_of, unpacked

DOCUMENT = Path(__file__).parents[2] / "docs" / "run-format.md"


def agree(path: Path) -> None:
    """The reader in plain Python and ours give the same numbers, bit for bit."""
    run, found = probes.open_run(path), plain_reader.read(path)
    assert sorted(found) == run.metrics
    manifest = plain_reader.small_file(path / "run.json")
    for name, rows in found.items():
        assert [step for step, _ in rows] == run.steps(name).tolist()
        values = [row for _, row in rows]
        if name in ("depth_weight", "depth_weight_std", "contribution_rms", "depth_attribution"):
            values = [unpacked(cells, manifest) for cells in values]
        if name in ("mixing_weight", "mixing_share"):
            states = range(1, len(manifest["layout"]["layers"]) + 2)
            values = [rows_of(cells, states) for cells in values]
        ours = run[name]
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(ours.shape), ours)


@pytest.mark.parametrize("kind", ["prenorm", "full", "block of 4, ragged"])
def test_an_independent_reader_agrees(kind, tmp_path):
    model = decoder(kind)
    optimizer = sgd(model)
    path = tmp_path / "run"
    with probes.record(model, path, optimizer=optimizer, every=2, matrices_every=3) as recorder:
        train(model, optimizer, 7, after=lambda loss: recorder.log(loss=loss))
    agree(path)
    run = probes.open_run(path)
    assert run.steps("loss").tolist() == list(range(7))
    assert run.steps("hidden_rms").tolist() == [0, 2, 3, 4, 6]
    assert plain_reader.small_file(path / "run.json")["format"] == 2
    assert plain_reader.small_file(path / "end.json")["status"] == "finished"


def test_an_independent_reader_agrees_on_a_resumed_run(tmp_path):
    for start, steps in ((0, 7), (5, 5), (3, 6)):
        model = decoder("full", blocks=1)
        optimizer = sgd(model)
        with probes.record(model, tmp_path / "run", optimizer=optimizer, every=2, resume=start) as recorder:
            train(model, optimizer, steps, start, after=lambda loss, start=start: recorder.log(loss=start))
    agree(tmp_path / "run")
    found = plain_reader.read(tmp_path / "run")
    assert [step for step, _ in found["loss"]] == list(range(9))
    assert [value for _, (value,) in found["loss"]] == [0] * 3 + [3] * 6


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parents[1] / "golden").glob("format-?")), ids=lambda p: p.name
)
def test_both_read_every_version_of_the_format(folder):
    agree(folder)


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
    assert read_shard(path).tensors["depth_weight"].tolist() == [[1, 0.75, 0.25, 0.5, 0.25, 0.25]]


def test_every_field_and_metric_is_documented(tmp_path):
    from probes.vocabulary import METRICS

    text = DOCUMENT.read_text(encoding="utf-8")
    model = decoder("block of 2")
    optimizer = sgd(model)
    for start in (0, 1):
        with probes.record(model, tmp_path / "run", optimizer=optimizer, resume=start):
            train(model, optimizer, 1, start)
    fields = set()
    names = ("run.json", "heartbeat.json", "end.json", "attempt-00001/attempt.json")
    for name in names:
        content = json.loads((tmp_path / "run" / name).read_text())
        fields |= set(content) | (set(content.get("versions", ())))
        for rows in content.get("layout", {}).items():
            fields |= {rows[0], *rows[1][0]}
    shard = Shard(next((tmp_path / "run" / "rank-00000").iterdir()).read_bytes())
    fields |= set(shard.metadata) | {"attempt.json"}
    missing = [name for name in sorted(fields | set(METRICS)) if f"`{name}`" not in text]
    assert not missing
