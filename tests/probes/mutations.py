"""Files changed at random: bytes, values of JSON, headers and numbers of safetensors files, some with every checksum right again."""

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"

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
    "tokens-000000000000.safetensors", f"{0:012}-0123456789ab.safetensors",
]  # fmt: skip
INTEGERS = [-1, 0, 1, 5, 2**31, 2**40, 2**62, -(2**63)]
UNCHANGEABLE = (ValueError, struct.error, KeyError, TypeError, IndexError, AttributeError, RecursionError)


def changed(path: Path, chance: random.Random) -> bool:
    """Another content in a file's place; whether its checksums are right, which they are more often than not."""
    content = path.read_bytes()
    if chance.random() >= 0.4:
        try:
            path.write_bytes((changed_json if path.suffix == ".json" else changed_tensors)(content, chance))
            return True
        except UNCHANGEABLE:
            pass  # it had been changed already
    path.write_bytes(changed_bytes(content, chance))
    return False


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
    """JSON with another value, or one more or less, somewhere in it; also in JSON that is a text of it."""
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
    if isinstance(value, str) and value[:1] in "[{" and value and chance.random() < 0.85:
        return json.dumps(changed_value(json.loads(value), chance))
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


def changed_tensors(content: bytes, chance: random.Random) -> bytes:
    """Another header or other numbers, and the checksums right again as far as that can be told."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    way = chance.random()
    if way < 0.3:
        header["__metadata__"] = changed_value(header["__metadata__"], chance)
    elif way < 0.7:
        whole = [name for name, entry in header.items() if entry.get("dtype") == "I64"]
        name = chance.choice(whole or [name for name in header if name != "__metadata__"])
        first, last = header[name]["data_offsets"]
        place = first + 8 * chance.randrange((last - first) // 8)
        data[place : place + 8] = struct.pack("<q", chance.choice(INTEGERS))
    else:
        header = changed_value(header, chance)
        if not isinstance(header, dict):
            header = {}
    return sealed(header, data)


def sealed(header: dict, data: bytearray) -> bytes:
    """A file of this header and these tensors, with the checksums right as far as that can be told."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        metadata.pop("crc32", None)
        try:
            metadata["crc32"] = f"{(_sum_of_digest if 'digest' in metadata else _sum)(header, data):08x}"
        except Exception:  # the header makes no sense, and so no sum does
            metadata["crc32"] = "00000000"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


TYPES = {"F32": "float32", "I64": "int64", "F16": "float16", "I32": "int32", "U32": "uint32"}


def _sum(
    header: dict,
    data: bytearray,
    tensor: Callable[[str, bytes, int], int] = lambda _, *part: zlib.crc32(*part),
) -> int:
    """CRC-32 over metadata and tensors; `tensor` adds the content of each."""
    crc = 0
    for key in sorted(header["__metadata__"]):
        crc = zlib.crc32(f"{key}={header['__metadata__'][key]}\n".encode(), crc)
    for name in sorted(set(header) - {"__metadata__"}):
        entry = header[name]
        shape = "x".join(map(str, entry["shape"]))
        crc = zlib.crc32(f"{name} {TYPES[entry['dtype']]} {shape}\n".encode(), crc)
        crc = tensor(name, data[slice(*entry["data_offsets"])], crc)
    return crc


def _sum_of_digest(header: dict, data: bytearray) -> int:
    """The same of a digest, whose table of sums is made anew in `data`."""
    sums = []
    for name in sorted(set(header) - {"__metadata__", "crc"}):
        part = data[slice(*header[name]["data_offsets"])]
        sums += [zlib.crc32(part[at : at + 65536]) for at in range(0, len(part), 65536)]
    table = struct.pack(f"<{len(sums)}I", *sums)
    first, last = header["crc"]["data_offsets"]
    if last - first == len(table):
        data[first:last] = table
    return zlib.crc32(table, _sum(header, data, lambda name, part, crc: crc))


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
