"""The ranks of a run: the processes that train one model, and what their values stand for.

Rank 0 writes what the run's own files say; each other rank has a folder beside rank 0's, with a heartbeat and an end
marker, and shards of its own where values are "local". Needs no torch.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from probes.careful import printable

MANIFEST = "rank.json"
MOST = 100_000  # five digits
BEAT_SECONDS = 10.0  # of a rank other than 0: a thousand of them share one file system

MERGED, LOCAL, ONE = "merged", "local", "one"
VALUES = {
    MERGED: "of all ranks together",
    LOCAL: "of each rank alone, in its own folder",
    ONE: "of the one rank that records",
}

_FOLDER = re.compile(r"rank-([0-9]{5})")
_LONGEST = 200


@dataclass(frozen=True)
class Ranks:
    """`world` processes; `values` says what the rows stand for, `merged` which metrics are those of all ranks (the others are
    rank 0's own), `parallel` how the model was spread over them, in JSON."""

    world: int = 1
    values: str = ONE
    merged: tuple[str, ...] = ()
    parallel: Mapping = field(default_factory=dict)

    def to_json(self) -> dict:
        return {
            "world": self.world,
            "values": self.values,
            "merged": list(self.merged),
            "parallel": dict(self.parallel),
        }

    @classmethod
    def from_json(cls, data: object) -> "Ranks":
        """ValueError for what no depthscope wrote."""
        if data is None:
            return cls()
        if not isinstance(data, dict):
            raise ValueError("ranks are an object")
        world, values, merged = data.get("world"), data.get("values"), data.get("merged", [])
        if type(world) is not int or not 1 <= world <= MOST:
            raise ValueError(f"a world of {printable(world, 20)} ranks")
        texts = [values, *merged] if isinstance(merged, list) else [None]
        if not all(isinstance(text, str) and len(text) <= _LONGEST and text.isprintable() for text in texts):
            raise ValueError("what values stand for, and names of metrics, are texts")
        return cls(world, values, tuple(merged), dict(data.get("parallel") or {}))


def rank_folder(attempt: Path, rank: int) -> Path:
    """The folder of a rank in that of an attempt."""
    return attempt / f"rank-{rank:05d}"


def ranks_in(attempt: Path) -> list[int]:
    """Ranks that have a folder there, in order."""
    try:
        found = [_FOLDER.fullmatch(entry.name) for entry in os.scandir(attempt)]
    except OSError:
        return []
    return sorted(int(match[1]) for match in found if match is not None)
