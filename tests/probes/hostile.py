"""Runs that a stranger made: the golden ones, changed at random, some so cleverly that every checksum is right.

    python -m tests.probes.hostile FOLDER COUNT SEED

opens COUNT of them within little memory, and says what was raised that is no explanation.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path

import probes
from probes import checking

GOLDEN = Path(__file__).parents[1] / "golden"
MEMORY = 512 << 20  # bytes more than an idle reader
SECONDS = 20  # for one run; it takes milliseconds

NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    255,
    2**31,
    2**53,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]
VALUES = [
    *NUMBERS, None, True, False, "", "x", "12", "\x1b[2J", "<script>alert(1)</script>", "\ud800", "\0", "ä" * 5000,
    "../../etc/passwd", [], {}, [[]], [0] * 1000, {"a": {"b": {}}}, {"every": 0},
]  # fmt: skip
NAMES = [
    "000000000000-000000000000.safetensors", "000000000009-000000000000.safetensors", "٠-٠.safetensors",
    f"{0:012}-{10**15:012}.safetensors", f"{'9' * 100}-{'9' * 100}.safetensors", ".safetensors", "a\x1b[2Jb.safetensors",
]  # fmt: skip


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, cut, doubled, filled or put in."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(data) + 1)
        until = min(len(data), place + chance.choice([1, 1, 8, 100]))
        match chance.randrange(6):
            case 0 if until > place:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place:until]
            case 2:
                data[place:place] = data[place:until]
            case 3:
                data[place:until] = bytes([chance.choice([0, 255, 0x22, 0x5B, 0x7B, 0x39])]) * (until - place)
            case 4:
                data[place:place] = chance.randbytes(chance.randrange(9))
            case 5:
                del data[place:]
    return bytes(data)


def changed_value(value: object, chance: random.Random) -> object:
    """JSON with another value, or one more or less, somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.05:
            return {**value, str(chance.choice(VALUES)): chance.choice(VALUES)}
        return {**value, key: changed_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        if chance.random() < 0.1:
            return value[:place] + value[place:] * chance.choice([2, 3000])
        return [*value[:place], changed_value(value[place], chance), *value[place + 1 :]]
    if type(value) is int and chance.random() < 0.3:
        return value + chance.choice([-1, 1, 10, 1000, 10**9])
    return chance.choice(VALUES)


def changed_json(content: bytes, chance: random.Random) -> bytes:
    """Another value in it, and the checksum right again."""
    data = json.loads(content)
    data.pop("crc32", None)
    if chance.random() < 0.02:
        return b'{"config": ' + b"[" * 10 ** chance.choice([2, 5]) + b"]" * 10 + b"}"
    data = changed_value(data, chance)
    text = json.dumps(data, indent=1)
    if not isinstance(data, dict) or not data:
        return text.encode()
    body = (text[:-2] + ",\n ").encode("utf-8", "surrogatepass")
    return body + b'"crc32": "%08x"\n}\n' % zlib.crc32(body)


def changed_shard(content: bytes, chance: random.Random) -> bytes:
    """Another header or other numbers, and the checksum right again as far as that can be told."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if chance.random() < 0.5:
        name = chance.choice([name for name in header if name.endswith(".step")])
        first, last = header[name]["data_offsets"]
        step = chance.choice([-1, 0, 1, 5, 2**40, 2**62, -(2**63)])
        place = first + 8 * chance.randrange((last - first) // 8)
        data[place : place + 8] = struct.pack("<q", step)
    else:
        header = changed_value(header, chance)
        if not isinstance(header, dict):
            header = {}
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        metadata.pop("crc32", None)
        try:
            metadata["crc32"] = f"{_sum(header, bytes(data)):08x}"
        except Exception:  # the header makes no sense, and so no sum does
            metadata["crc32"] = "00000000"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


def _sum(header: dict, data: bytes) -> int:
    types, crc = {"F32": "float32", "I64": "int64", "F16": "float16"}, 0
    for key in sorted(header["__metadata__"]):
        crc = zlib.crc32(f"{key}={header['__metadata__'][key]}\n".encode(), crc)
    for name in sorted(set(header) - {"__metadata__"}):
        entry = header[name]
        shape = "x".join(map(str, entry["shape"]))
        crc = zlib.crc32(f"{name} {types[entry['dtype']]} {shape}\n".encode(), crc)
        crc = zlib.crc32(data[slice(*entry["data_offsets"])], crc)
    return crc


def other_thing(path: Path, chance: random.Random) -> None:
    """Something that is no regular file in a file's or a folder's place, or one too many."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    match chance.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(
                chance.choice(["/dev/zero", "/etc/passwd", "/", path.name, "..", GOLDEN / "format-1"])
            )
        case 2:
            path.mkdir()
        case 3:
            with open(path, "wb") as file:
                file.truncate(chance.choice([1 << 20, 1 << 31, 1 << 40]))
        case 4:
            path.parent.joinpath(chance.choice(NAMES)).write_bytes(chance.randbytes(100))
        case 5:
            path.parent.joinpath(f"attempt-{chance.randrange(99999):05}").symlink_to(
                chance.choice([".", "/", GOLDEN])
            )


def changed_run(folder: Path, chance: random.Random) -> None:
    """One of the golden runs in `folder`, changed in a few places."""
    shutil.copytree(
        GOLDEN / chance.choice(["format-1", "format-2", "format-2"]), folder, copy_function=shutil.copyfile
    )
    for _ in range(chance.choice([1, 1, 2, 3])):
        paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.exists())
        path = chance.choice(paths)
        if chance.random() < 0.1:
            other_thing(path, chance)
        elif path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
            content, way = path.read_bytes(), chance.random()
            try:
                if way < 0.4:
                    content = changed_bytes(content, chance)
                elif path.suffix == ".json":
                    content = changed_json(content, chance)
                else:
                    content = changed_shard(content, chance)
            except (
                ValueError,
                struct.error,
                KeyError,
                TypeError,
                IndexError,
                AttributeError,
                RecursionError,
            ):
                content = changed_bytes(content, chance)  # it had been changed already
            path.write_bytes(content)


def look(folder: Path, thoroughly: bool) -> None:
    """Everything that a reader asks of a run, and a check of it. RunError is an explanation; whatever else is raised is none."""
    try:
        run = probes.open_run(folder)
    except probes.RunError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1500
    else:
        repr(run), run.last_seen, run.created, run.size
        for name in run.metrics:
            assert len(run.steps(name)) == len(run[name]) and name in run
        said = [*run.problems, run.status_reason, repr(run.attempts)]
        assert all(text.isprintable() for text in said)
        [layer.label for layer in (*run.layers, *run.reads, *run.sources)]
        run.manifest.vectors(10), run.manifest.matrices.next(10)
        run.refresh()
    if thoroughly:
        assert str(checking.check(folder)).replace("\n", "").isprintable()


def main(folder: Path, count: int, seed: int) -> int:
    def late(number, frame):
        raise TimeoutError(f"longer than {SECONDS} s")

    look(GOLDEN / "format-2", True)
    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    warnings.simplefilter("ignore")
    wrong = 0
    # In memory, where there is such a place: making and removing small files is most of the work.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else folder))
    for number in range(seed, seed + count):
        place = folder / str(number)
        changed_run(place, random.Random(number))
        signal.alarm(SECONDS)
        try:
            look(place, number % 8 == 0)
        except BaseException:
            wrong += 1
            print(f"run {number}:", traceback.format_exc(), flush=True)
        finally:
            signal.alarm(0)
        if not wrong:
            shutil.rmtree(place)
        if wrong == 10:
            break
    if not wrong:
        folder.rmdir()
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
