"""One small JSON file of a run: replaced whole or not at all, with a checksum as its last field, read with care."""

import json
import re
import zlib
from pathlib import Path

from probes.careful import read_bytes
from probes.whole import write_whole

MOST_BYTES = 16 << 20  # of run.json
MOST_SIGN = 1 << 20  # of a heartbeat or an end marker
_DEEPEST = 50

_CHECKSUM = re.compile(rb'"crc32": "([0-9a-f]{8})"\n\}\n\Z')


def write_json(path: Path, data: dict, durable: bool = True) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it; `durable`: a power cut too.

    The last field is `crc32`, the CRC-32 of every byte before its name.
    """
    body = json.dumps(data, indent=1, ensure_ascii=False)[: -len("\n}")] + ",\n "
    content = body.encode()
    content += b'"crc32": "%08x"\n}\n' % zlib.crc32(content)
    write_whole(path, content, durable)


def parse_json(content: bytes) -> dict:
    """The object that `content` holds. Raises ValueError, in a clause, for anything else."""
    try:
        data = json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    _bounded(data)
    data.pop("crc32", None)
    return data


def _bounded(data: dict) -> None:
    """ValueError where values are nested so deeply that nobody dares to walk through them."""
    inner, depth = [data], 0
    while inner:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        below = [value for each in inner for value in (each.values() if isinstance(each, dict) else each)]
        inner = [value for value in below if isinstance(value, dict | list)]


def read_json(path: Path, most: int = MOST_SIGN) -> dict | None:
    """The content of a small JSON object, or None when it is missing or not one."""
    try:
        return parse_json(read_bytes(path, most))
    except (OSError, ValueError):
        return None


def intact(content: bytes) -> bool | None:
    """Whether a file's bytes match the checksum they end with; None where there is none."""
    found = _CHECKSUM.search(content)
    if found is None:
        return None
    return int(found[1], 16) == zlib.crc32(content[: found.start()])
