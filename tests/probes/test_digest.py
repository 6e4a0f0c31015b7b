"""A digest says what its shards say, at every zoom; where it does not do, the shards are read and nothing is lost."""

import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cli import main
from probes import compacting, series
from probes import manifest as files
from probes.digest import FOLDER, Digest, DigestError
from probes.run import Run
from probes.shard import shard_name, write_shard
from tests.probes.digested import begin, compacted, same, seal, values


@pytest.fixture
def believed(monkeypatch):
    """Nothing falls back on reading shards."""

    def never(self):
        raise AssertionError(f"the digest of {self._name} did not do")

    monkeypatch.setattr(series.Stored, "_read", never)


def test_it_gives_every_row_of_every_metric_and_attempt(digestible, believed):
    wanted = values(Run(digestible))
    assert compacted(digestible, whole=False) > 4
    found = Run(digestible)
    assert any(attempt.parts for attempt in found.attempts), "the last shards fill no file: they are read"
    assert all(attempt.digests for attempt in found.attempts)
    same(found, wanted)
    assert (found.last_step, found.size, found.problems) == (299, Run(digestible).size, [])
    assert compacted(digestible) > 0
    found = Run(digestible)
    assert not any(attempt.parts for attempt in found.attempts)
    same(found, wanted)
    for name, (steps, numbers) in wanted.items():
        index = np.random.default_rng(0).integers(0, len(steps), 40)
        np.testing.assert_array_equal(found.series(name).at(index), numbers[index])
    done = CliRunner().invoke(main, ["check", str(digestible)])
    assert done.exit_code == 0 and "sound" in done.output and "Note" not in done.output


def binned(numbers: np.ndarray, start: int, count: int) -> tuple[np.ndarray, ...]:
    part = numbers[start : start + count].astype(np.float64)
    part = np.where(np.isfinite(part), part, np.nan)
    known = np.isfinite(part).sum(axis=0)
    mean = np.where(known, np.nansum(part, axis=0) / np.maximum(known, 1), np.nan)
    return np.fmin.reduce(part, axis=0), mean, np.fmax.reduce(part, axis=0), count - known


@pytest.mark.parametrize("most", [1, 2, 7, 40, 1000])
def test_bins_are_of_the_rows_they_say(digestible, believed, most):
    wanted = values(Run(digestible))
    compacted(digestible, whole=False)
    found = Run(digestible)
    for name, (steps, numbers) in wanted.items():
        for first, last in ((None, None), (17, 251), (100, 101), (290, 999), (400, 500)):
            bins = found.series(name).bins(most, first, last)
            inside = steps[(steps >= (first or 0)) & (steps <= (last or 10**9))]
            assert len(bins) <= most and bins.count.sum() == len(inside)
            for i in range(len(bins)):
                start, count = int(bins.start[i]), int(bins.count[i])
                assert (bins.first[i], bins.last[i]) == (steps[start], steps[start + count - 1])
                low, mean, high, bad = binned(numbers, start, count)
                np.testing.assert_array_equal(bins.low[i], low.astype(np.float32))
                np.testing.assert_array_equal(bins.high[i], high.astype(np.float32))
                np.testing.assert_allclose(bins.mean[i], mean, rtol=1e-4, atol=1e-6)
                there = ~np.isnan(bins.nonfinite[i])
                np.testing.assert_array_equal(bins.nonfinite[i][there], bad[there])


@given(
    rows=st.integers(2, 3000),
    at=st.floats(0, 1, exclude_max=True),
    most=st.integers(1, 300),
    span=st.integers(1, 3000),
    group=st.integers(9, 700),
)
@settings(deadline=None, max_examples=20)
def test_a_spike_of_one_step_is_in_the_bins_at_every_zoom(rows, at, most, span, group):
    spike = int(at * rows)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compacting, "ROWS", group)
        shards = begin(Path(folder) / "run")
        for number, start in enumerate(range(0, rows, 100)):
            steps = np.arange(start, min(start + 100, rows))
            tensors = {"hidden_rms": np.ones((len(steps), 5), np.float32), "hidden_rms.step": steps}
            tensors["hidden_rms"][steps == spike, 2] = 1e6
            tensors["hidden_rms"][steps == spike, 3] = np.nan
            about = {"rank": "0", "attempt": "0", "shard": str(number)}
            write_shard(shards / shard_name(int(steps[0]), int(steps[-1])), tensors, about, durable=False)
        compacted(Path(folder) / "run", whole=False)
        found = Run(Path(folder) / "run").series("hidden_rms")
        for first in {0, max(0, spike - span), spike}:
            for columns, place in ((None, 2), ([2, 3], 0)):
                bins = found.bins(most, first, spike + span, columns)
                (hit,) = np.flatnonzero((bins.first <= spike) & (bins.last >= spike))
                assert bins.high[hit, place] == 1e6 and bins.nonfinite[hit, place + 1] == 1
                assert (np.delete(bins.high[:, place], hit) == 1).all()


# What cannot be trusted


def test_a_damaged_digest_is_passed_over(digestible):
    wanted = values(Run(digestible))
    compacted(digestible)
    digest = sorted((digestible / files.RANK_FOLDER / FOLDER).iterdir())[0]
    content = digest.read_bytes()
    places = np.linspace(0, len(content) - 1, 60).astype(int)
    unseen = 0
    for place in places:
        digest.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        found = Run(digestible)
        for name in ("hidden_rms", "loss"):  # a pyramid is not read by this
            np.testing.assert_array_equal(found.steps(name), wanted[name][0])
            np.testing.assert_array_equal(found[name], wanted[name][1])
            bins = found.series(name).bins(3)
            flat = wanted[name][1].reshape(len(wanted[name][1]), -1)
            assert np.nanmax(bins.high) == np.nanmax(flat[np.isfinite(flat)])
        try:
            Digest(digest, digestible / files.RANK_FOLDER).verify()
            unseen += 1
        except DigestError as error:
            assert "\n" not in str(error)
    assert unseen == 0
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        digest.write_bytes(content[:length])
        same(Run(digestible), wanted)


def test_damage_behind_the_header_is_said_when_it_is_met(digestible):
    wanted = values(Run(digestible))
    compacted(digestible)
    file = sorted((digestible / files.RANK_FOLDER / FOLDER).iterdir())[0]
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    first, _ = json.loads(content[8 : 8 + length])["steps.0"]["data_offsets"]
    content[8 + length + first] ^= 1
    file.write_bytes(content)
    found = Run(digestible)
    assert not found.problems, "nobody has looked there"
    same(found, wanted)
    (problem,) = found.problems
    assert f"The digest {file.name} does not match its checksum" in problem
    file.unlink()
    assert not found.problems


@pytest.mark.parametrize("every", [pytest.param(1, marks=(pytest.mark.long, pytest.mark.timeout(3000))), 101])
def test_every_flipped_bit_and_every_truncation_of_a_digest_is_seen(every, tmp_path):
    """Each, or each 101st, a number that is no multiple of eight."""
    shards = begin(tmp_path / "run")
    seal(shards, range(4), 0)
    compacted(tmp_path / "run")
    (path,) = (shards / FOLDER).iterdir()
    content = path.read_bytes()

    def passes(changed: bytes) -> bool:
        path.write_bytes(changed)
        try:
            Digest(path, shards).verify()
        except DigestError:
            return False
        return True

    assert passes(content)
    unseen, changed = [], bytearray(content)
    for place in range(0, 8 * len(content), every):
        changed[place >> 3] ^= 1 << (place & 7)
        unseen += [place] if passes(bytes(changed)) else []
        changed[place >> 3] ^= 1 << (place & 7)
    assert unseen == [] and bytes(changed) == content
    assert not any(passes(content[:length]) for length in range(0, len(content), every))
    assert not passes(content + b"\0")


def test_a_digest_of_other_shards_is_passed_over_and_made_anew(digestible, tmp_path):
    wanted = values(Run(digestible))
    compacted(digestible)
    other = begin(tmp_path / "other", created=5.0)
    for number in range(9):
        seal(other, range(30 * number, 30 * number + 30), number, seed=1, blanks=False)
    shutil.copytree(digestible / files.RANK_FOLDER / FOLDER, other / FOLDER)
    found = Run(tmp_path / "other")
    assert not found.attempts[0].digests and np.isfinite(found["hidden_rms"]).all()
    done = CliRunner().invoke(main, ["check", str(tmp_path / "other")])
    assert done.exit_code == 1 and "is of another created" in done.output
    done = CliRunner().invoke(main, ["compact", str(tmp_path / "other"), str(digestible)])
    assert (
        done.exit_code == 0 and "that did not fit deleted" in done.output and "nothing to do" in done.output
    )
    assert CliRunner().invoke(main, ["check", str(tmp_path / "other")]).exit_code == 0
    same(Run(digestible), wanted)


def test_a_shard_that_is_gone_or_damaged_takes_its_digest_with_it(digestible):
    compacted(digestible)
    shards = sorted((digestible / files.RANK_FOLDER).glob("*.safetensors"))
    opened = Run(digestible)
    content = shards[1].read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    shards[1].write_bytes(content[:start] + bytes(len(content) - start))
    # It was opened when all was well: what is there no more is blank, and the rest is not.
    found = opened["hidden_rms"]
    assert np.isnan(found[30:60]).all() and len(found) == len(opened.steps("hidden_rms"))
    assert any("000000000030" in problem for problem in opened.problems)
    done = CliRunner().invoke(main, ["check", str(digestible), "--repair"])
    assert (
        "which is damaged" in done.output and "was put aside" in done.output and "was deleted" in done.output
    )
    assert CliRunner().invoke(main, ["check", str(digestible)]).exit_code == 0  # the gap is a note
    found = Run(digestible)
    assert set(range(30, 60)).isdisjoint(found.steps("hidden_rms").tolist())
    assert CliRunner().invoke(main, ["compact", str(digestible)]).exit_code == 0
    same(Run(digestible), values(found))


def test_links_and_pipes_in_the_place_of_a_digest_are_passed_over(digestible):
    wanted = values(Run(digestible))
    compacted(digestible)
    folder = digestible / files.RANK_FOLDER / FOLDER
    first, second, *_ = sorted(folder.iterdir())
    elsewhere = digestible.parent / "elsewhere"
    shutil.move(first, elsewhere)
    first.symlink_to(elsewhere)
    second.unlink()
    os.mkfifo(second)
    same(Run(digestible), wanted)
    shutil.move(folder, digestible.parent / "digests")
    folder.symlink_to(digestible.parent / "digests", target_is_directory=True)
    found = Run(digestible)
    assert not found.attempts[0].digests
    same(found, wanted)


# By its page alone


def test_the_page_is_enough_to_read_one(digestible):
    """docs/run-format.md with struct, json and zlib: sums, steps, a row from its shard, and the pyramid."""
    compacted(digestible)
    wanted = values(Run(digestible))
    at = 0
    for path in sorted((digestible / files.RANK_FOLDER / FOLDER).iterdir()):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        told = header.pop("__metadata__")
        content = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            content[name] = data[8 + length + first : 8 + length + last]
        sums = []
        for name in sorted(set(content) - {"crc"}, key=str.encode):
            sums += [zlib.crc32(content[name][i : i + 65536]) for i in range(0, len(content[name]), 65536)]
        assert list(struct.unpack(f"<{len(sums)}I", content["crc"])) == sums
        crc = 0
        for key in sorted(set(told) - {"crc32"}, key=str.encode):
            crc = zlib.crc32(f"{key}={told[key]}\n".encode(), crc)
        kinds = {"I64": "int64", "F32": "float32", "U32": "uint32", "I32": "int32"}
        for name in sorted(header, key=str.encode):
            shape = "x".join(map(str, header[name]["shape"]))
            crc = zlib.crc32(f"{name} {kinds[header[name]['dtype']]} {shape}\n".encode(), crc)
        assert f"{zlib.crc32(content['crc'], crc):08x}" == told["crc32"]
        about = json.loads(told["metrics"])["hidden_rms"]
        rows, width = about["rows"], about["width"]
        steps = struct.unpack(f"<{rows}q", content[about["steps"]])
        assert (steps[0], steps[-1]) == (about["first"], about["last"])
        shards = list(struct.iter_unpack("<5q", content["shards"]))
        pieces = list(struct.iter_unpack("<5q", content["pieces.hidden_rms"]))
        found = b""
        for shard, start, count, crc32, item in pieces:
            name = "{:012d}-{:012d}.safetensors".format(*shards[shard][:2])
            piece = (digestible / files.RANK_FOLDER / name).read_bytes()[start : start + count * width * item]
            assert zlib.crc32(piece) == crc32
            found += piece
        shown = sum(step < 200 for step in steps)  # what the second attempt does not hide
        numbers = np.array(struct.unpack(f"<{rows * width}f", found), np.float32).reshape(rows, width)
        np.testing.assert_array_equal(numbers[:shown], wanted["hidden_rms"][1][at : at + shown])
        at += shown
        bins = -(-rows // 8)
        level = struct.unpack(f"<{width * 3 * bins}f", content["level.1.hidden_rms"])
        for column in range(width):
            for each in range(bins):
                part = numbers[8 * each : 8 * each + 8, column]
                part = part[np.isfinite(part)]
                low, _, high = (level[(column * 3 + which) * bins + each] for which in range(3))
                assert (low, high) == (part.min(), part.max()) if len(part) else low != low
    assert at == 200
