"""Every page over runs that a stranger made: words, numbers and files that try to be something else."""

import json
import os
import random
import shutil
import signal
import socket
import struct
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

from probes import compacting
from probes import manifest as files
from probes.digest import FOLDER
from probes.manifest import RANK_FOLDER
from probes.shard import shard_name
from probes.tokens import write_tokens
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import PAGES, opened, said
from tests.probes import hostile

# Nothing of it in the server's log: numpy's complaints about numbers that it cannot divide or sum.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

LONG = "n" * 250
WORDS = (
    "\u202egnp.exe", "\u2066\u2069\u200b\ufeff", "\x1b[2J\x07\x00", "a\nb\r\nc\td", "{{7*7}} ${7*7} %s %n", "☃" * 3000,
    "</script><script>alert(1)</script>", "'; DROP TABLE runs; --", "../../../etc/passwd", "[x](javascript:alert(2))",
    "\u0301" * 500, "datum['x']; alert(3)", "'\u2028\u2029\\",
)  # fmt: skip
NUMBERS = (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -1.0)


def words(root: Path) -> None:
    """A run of a long name, and one whose texts are of every kind that a text should not be."""
    made.run(root / LONG, "full", blocks=2, steps=3)
    made.run(root / os.fsdecode(b"bytes \xff"), "full", blocks=2, steps=3)  # no text at all
    config = {word: word for word in WORDS} | {"deep": json.loads("[" * 40 + "]" * 40), "NaN": float("nan")}
    config |= {
        "residual": "</script>",
        "lr": float("inf"),
        "blocks": 10**400,
        "width": None,
        "seed": {"a": [[]]},
    }
    told = replace(
        made.manifest("full", 2), tags=WORDS, config=config, versions={"torch": WORDS, "x": 10**400}
    )
    writer = RunWriter(root / "\u202etxt.\u2028<b>", told)
    for step in (0, 10, 20):
        rows = [*made.rows("full", told.layout, step), ("{{alert(4)}}", step, np.float32(step))]
        writer.put(lambda rows=rows: rows, step)
    writer.close("stopped", "".join(WORDS))
    weight = np.broadcast_to(made.triangle(told.layout, 0.5)[0], (2, len(WORDS), 5, 5))
    for step in (0, 20):
        write_tokens(
            root / "\u202etxt.\u2028<b>" / RANK_FOLDER,
            step,
            told.layout.pack(weight),
            None,
            [list(WORDS)] * 2,
        )


def numbers(root: Path) -> None:
    """Every value of every metric, one time after the other, one that no plot likes; steps as far apart as they can be."""
    for place, residual in enumerate(("full", "block", "prenorm")):
        told = made.manifest(residual, 2)
        writer = RunWriter(root / f"numbers {residual}", told)
        for number, value in enumerate(NUMBERS):
            step = (10 * number, 10**14 * number, number)[place]
            rows = [
                (name, step, np.full_like(row, value))
                for name, _, row in made.rows(residual, told.layout, step)
            ]
            writer.put(lambda rows=rows: rows, step)
        writer.close("finished")
    made.follow(root / "numbers full", (0,), tokens=4)


def things(root: Path) -> list[socket.socket]:
    """Sound runs with what is no file in the place of files, and with files that are too large, deep or full of promises."""
    for name in ("things", "promises", "pipes"):
        made.run(root / name, "full", blocks=2, steps=4)
        made.follow(root / name, (0, 20), tokens=4)
        made.attribution(root / name, step=20)
    shards = root / "things" / RANK_FOLDER
    for number, target in enumerate(
        ("/dev/zero", "/etc/passwd", "..", shard_name(900, 900), "/proc/self/mem")
    ):
        (shards / shard_name(900 + number, 900 + number)).symlink_to(target)
    (shards / shard_name(910, 910)).mkdir()
    os.mkfifo(shards / shard_name(911, 911))
    (shards / "tokens-000000000900.safetensors").symlink_to("/dev/zero")
    (shards / FOLDER).symlink_to("..", target_is_directory=True)
    (root / "things" / "attempt-00001").symlink_to(".", target_is_directory=True)
    (root / "things" / "attribution" / f"{0:012}-{'0' * 12}.safetensors").symlink_to("/dev/random")
    (root / "cycle").mkdir()
    (root / "cycle" / "again").symlink_to("..", target_is_directory=True)
    bound = socket.socket(socket.AF_UNIX)
    with_short_name = Path.cwd()
    os.chdir(shards)  # a socket's name has a hundred characters at most
    try:
        bound.bind(shard_name(912, 912))
    finally:
        os.chdir(with_short_name)
    shards = root / "promises" / RANK_FOLDER
    for number, header in enumerate(
        (
            {"loss": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
            {"loss": {"dtype": "F32", "shape": [10**300] * 400, "data_offsets": [0, 4]}},
            {f"m{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)},
            {"loss": {"dtype": "F32", "shape": [0, 10**18], "data_offsets": [0, 0]}},
        )
    ):
        text = json.dumps({"__metadata__": {"crc32": "00000000"}, **header}).encode()
        (shards / shard_name(900 + number, 900 + number)).write_bytes(struct.pack("<Q", len(text)) + text)
    (shards / shard_name(920, 920)).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    (shards / shard_name(921, 921)).write_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6)
    with open(shards / shard_name(922, 922), "wb") as file:
        file.truncate(1 << 40)
    (root / "promises" / files.END).write_text(
        '{"status": "finished", "a": ' + "[" * 10**5 + "]" * 10**5 + "}"
    )
    for name in (files.HEARTBEAT, files.END):
        (root / "pipes" / name).unlink()
        os.mkfifo(root / "pipes" / name)
    os.mkfifo(root / "pipes" / "attribution" / f"{5:012}-{'1' * 12}.safetensors")
    for name, content in (
        ("deep", b'{"a": ' * 10**5),
        ("nan", b'{"format": NaN}'),
        ("huge", b'{"format": 1' + b"0" * 4000 + b"}"),
        ("latin", b"\xff\xfe\x00"),
    ):
        (root / name).mkdir()
        (root / name / files.MANIFEST).write_bytes(content)
    (root / "device").mkdir()
    (root / "device" / files.MANIFEST).symlink_to("/dev/zero")
    return [bound]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    words(root)
    numbers(root)
    kept = things(root)
    yield root
    for each in kept:
        each.close()


def strict(text: str) -> object:
    """JSON as a browser takes it."""

    def never(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=never)


def accepted(at) -> None:
    """No exception, and nothing that a browser would not parse."""
    assert not at.exception, [error.value for error in at.exception]
    assert at.title[0].value.endswith("?")
    for element in at.get("bidi_component"):
        strict(element.proto.mixed.json or element.proto.json or "null")
        for blob in element.proto.mixed.arrow_blobs.values():
            assert len(blob.data) < 32 << 20
    for element in at.get("html"):
        assert "<script" not in element.proto.body and "<img" not in element.proto.body


PICKED = {
    "words": [LONG, "\\u202etxt.\\u2028<b>", "bytes \\udcff"],
    "numbers": ["numbers full", "numbers block", "numbers prenorm"],
    "things": ["things", "promises", "pipes"],
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("runs", PICKED.values(), ids=list(PICKED))
def test_every_page_opens(root, page, runs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    at = opened(root, f"pages_/{page}.py", runs=runs, scalar="{{alert(4)}}")
    accepted(at)
    told = said(at)
    for name in ("deep", "nan", "huge", "latin", "device"):
        assert f"{root.name}/{name} {'has format 1000' if name == 'huge' else 'cannot be opened'}" in told
    if "promises" in runs:
        assert "is a link to somewhere else" in told and "is not a regular file" in told
        assert "larger than the 1024 MiB" in told


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["words", "numbers"])
def test_a_browser_takes_it(root, kind, watched, serve):
    """No error on its console, nothing fetched from elsewhere, no dialog, and charts where there are any."""
    dialogs = []
    watched.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    address = serve(root)
    for page in ("", "dilution", "depth_attention", "tokens"):
        watched.goto(f"{address}/{page}?{urlencode({'runs': PICKED[kind]}, doseq=True)}")
        watched.get_by_text("cannot be opened").first.wait_for(timeout=30_000)  # the last thing on each page
        watched.wait_for_selector(".depthscope-chart :is(canvas, svg)", timeout=30_000)
        watched.wait_for_timeout(500)
    assert dialogs == []


# Changed at random


LONG_RANGES = [
    pytest.param(first, 200, marks=(pytest.mark.long, pytest.mark.timeout(7200)))
    for first in range(1000, 2400, 200)
]


@pytest.mark.parametrize(("first", "count"), [(0, 14), *LONG_RANGES])
def test_pages_open_over_changed_runs(first, count, tmp_path, monkeypatch):
    """One page of each, in turn; the runs of tests/probes/hostile.py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compacting, "ROWS", 60)
    sound = hostile.make(tmp_path / "sound")
    # Of computing, which a busy machine does not make longer; one that waits for ever meets pytest's own limit.
    signal.signal(signal.SIGPROF, lambda *_: pytest.fail("a page computes for longer than a minute"))
    for number in range(first, first + count):
        root = tmp_path / str(number)
        root.mkdir()
        hostile.changed_run(sound, root / "run", random.Random(number))
        signal.setitimer(signal.ITIMER_PROF, 60)
        try:
            accepted(opened(root, f"pages_/{PAGES[number % len(PAGES)]}.py"))
        except BaseException:
            print(f"run {number}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(root)
