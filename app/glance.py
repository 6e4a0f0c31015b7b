"""A glance: what the table says of a run, from the least that has to be read; hundreds of runs in a moment."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from probes import Run
from probes.manifest import RANK_FOLDER
from probes.shard import ShardError, read_shard, shard_steps

LOSS = "loss"

# Kept by functools: making the key of a Streamlit cache takes longer than what is kept here.


@dataclass(frozen=True)
class Glance:
    """How a run is: its status, why and since when (seconds since 1970), last step (-1: none), last logged loss
    (None: none in the newest shards) and bytes on disk."""

    status: str
    reason: str
    since: float
    last_step: int
    loss: float | None
    size: int


class Unread(Run):
    """A run whose shards stay unread: its manifest, its status and nothing else."""

    def refresh(self) -> bool:
        """Reads nothing."""
        return False


@functools.lru_cache(4096)
def unread(path: Path, stamp: int) -> Unread:
    """What the run at `path` is, kept until `stamp` changes. Raises RunError."""
    return Unread(path)


def glance(path: Path, stamp: int) -> Glance:
    """How the run at `path` is now; `stamp` tells apart runs that were recorded there. Raises RunError."""
    run = unread(path, stamp)
    shards = _shards(path)
    return Glance(
        run.status,
        run.status_reason,
        run.last_seen.timestamp(),
        max((shard_steps(name)[1] for name, _, _ in shards), default=-1),
        _loss(path, tuple(shards)),
        sum(size for _, size, _ in shards),
    )


def _shards(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each shard, in order of their steps."""
    found = []
    try:
        with os.scandir(path / RANK_FOLDER) as entries:
            for entry in entries:
                if shard_steps(entry.name) is not None:
                    told = entry.stat()
                    found.append((entry.name, told.st_size, told.st_mtime_ns))
    except OSError:  # not begun, or deleted while we looked
        pass
    return sorted(found)


_NEWEST = 8  # shards looked through for a loss: it may be logged more rarely than shards are sealed


@functools.lru_cache(4096)
def _loss(path: Path, shards: tuple[tuple[str, int, int], ...]) -> float | None:
    """The last logged loss in the newest shards that can be read. Read again only when a shard was added or changed."""
    for name, _, _ in reversed(shards[-_NEWEST:]):
        try:
            values = read_shard(path / RANK_FOLDER / name).get(LOSS)
        except (ShardError, OSError):
            continue
        if values is not None and len(values):
            return float(values[-1])
    return None
