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
    """A run whose shards stay unread: its manifests, its status and nothing else."""

    def refresh(self) -> bool:
        """Looks for attempts only."""
        return self._look_for_attempts()


@functools.lru_cache(4096)
def unread(path: Path, stamp: int) -> Unread:
    """What the run at `path` is, kept until `stamp` changes. Raises RunError."""
    return Unread(path)


def glance(path: Path, stamp: int) -> Glance:
    """How the run at `path` is now; `stamp` tells apart runs that were recorded there. Raises RunError."""
    run = unread(path, stamp)
    run.refresh()
    last, loss, size = -1, None, 0
    for attempt in run.attempts:
        shards = _shards(attempt.folder / RANK_FOLDER)
        size += sum(each for _, each, _ in shards)
        if shards:
            end = shard_steps(shards[-1][0])[1]
            last = max(last, end if attempt.hidden_from is None else min(end, attempt.hidden_from - 1))
            found = _loss(attempt.folder / RANK_FOLDER, tuple(shards[-_NEWEST:]), attempt.hidden_from)
            loss = loss if found is None else found
    return Glance(run.status, run.status_reason, run.last_seen.timestamp(), last, loss, size)


def _shards(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each shard, in order of their steps."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if shard_steps(entry.name) is not None:
                    told = entry.stat(follow_symlinks=False)
                    found.append((entry.name, told.st_size, told.st_mtime_ns))
    except OSError:  # not begun, or deleted while we looked
        pass
    return sorted(found, key=lambda shard: shard_steps(shard[0])[::-1])


_NEWEST = 8  # shards looked through for a loss: it may be logged more rarely than shards are sealed


@functools.lru_cache(
    4096
)  # of few shards each: with all of them as a key, a long run would fill the memory as it grows
def _loss(folder: Path, shards: tuple[tuple[str, int, int], ...], below: int | None) -> float | None:
    """The last loss logged, at a step below `below`, in the newest shards, which are given, as far as they can be read.

    Read again only when a shard was added or changed.
    """
    for name, _, _ in reversed(shards):
        try:
            tensors = read_shard(folder / name).tensors
        except (ShardError, OSError):
            continue
        values, steps = tensors.get(LOSS), tensors.get(f"{LOSS}.step")
        if values is None or steps is None or values.shape != steps.shape:
            continue
        values = values if below is None else values[steps < below]
        if len(values):
            return float(values[-1])
    return None
