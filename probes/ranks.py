"""The ranks of a run: the processes that train one model, what their values stand for, and how each of them is.

Rank 0 writes what the run's own files say; each other rank has a folder beside rank 0's, with a heartbeat and an end
marker, and shards of its own where values are "local". Needs no torch.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from probes.careful import is_folder, printable
from probes.life import Life

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


class Statuses:
    """How the ranks of one attempt are, as their own heartbeats and end markers say."""

    def __init__(self, attempt: Path, ranks: Ranks, created: float):
        self._attempt, self._ranks, self._created = attempt, ranks, created
        self._lives: dict[int, Life] = {}

    def all(self) -> dict[int, tuple[str, str]]:
        """Of each rank "running", "finished", "stopped" or "missing", and why or since when."""
        if self._ranks.values == ONE:
            return {}
        there = set(ranks_in(self._attempt)) - {0}
        found = {0: self._life(0, self._attempt).state()}
        for rank in range(1, self._ranks.world):
            folder = rank_folder(self._attempt, rank)
            if rank in there and is_folder(folder):
                found[rank] = self._life(rank, folder).state()
            else:
                found[rank] = "missing", "it has no folder here"
        return found

    def problems(self, status: str) -> list[str]:
        """A sentence for all ranks that have stopped for one reason, where the run itself has another `status`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, (how, why) in self.all().items():
            if rank and how in ("stopped", "missing") and how != status:
                groups[f"{how}: {why}" if why else how].append(rank)
        few = [(ranks, why) for why, ranks in list(groups.items())[:5]]
        return [f"{_named(ranks)} of {self._ranks.world} {_be(ranks)} {why}." for ranks, why in few]

    def _life(self, rank: int, folder: Path) -> Life:
        if rank not in self._lives:
            self._lives[rank] = Life(folder, self._created)
        return self._lives[rank]


def _named(ranks: list[int]) -> str:
    first = ", ".join(map(str, ranks[:5])) + (f" and {len(ranks) - 5} more" if len(ranks) > 5 else "")
    return f"Rank {first}" if len(ranks) == 1 else f"Ranks {first}"


def _be(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"
