"""A glance: what the table says of a run, from the least that has to be read; hundreds of runs in a moment."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from probes import Run
from probes.attempts import Attempt
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
    """A run whose shards stay unread: its manifest, its attempts, its status and nothing else."""

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
    shards = [shard for attempt in run.attempts for shard in _shards(attempt)]
    return Glance(
        run.status,
        run.status_reason,
        run.last_seen.timestamp(),
        max((shard.last for shard in shards), default=-1),
        _loss(tuple(shards)),
        sum(shard.size for shard in shards),
    )


@dataclass(frozen=True)
class _Shard:
    """A shard, its last step that is shown, its bytes and the time of its last change."""

    path: Path
    last: int
    size: int
    changed: int


def _shards(attempt: Attempt) -> list[_Shard]:
    """Those that show something, in order of their steps."""
    found = []
    try:
        with os.scandir(attempt.folder / RANK_FOLDER) as entries:
            for entry in entries:
                first, last = shard_steps(entry.name) or (0, -1)
                if attempt.hidden_from is not None:
                    last = min(last, attempt.hidden_from - 1)
                if first <= last:
                    told = entry.stat()
                    found.append(_Shard(Path(entry.path), last, told.st_size, told.st_mtime_ns))
    except OSError:  # not begun, or deleted while we looked
        pass
    return sorted(found, key=lambda shard: shard.path.name)


_NEWEST = 8  # shards looked through for a loss: it may be logged more rarely than shards are sealed


@functools.lru_cache(4096)
def _loss(shards: tuple[_Shard, ...]) -> float | None:
    """The last logged loss in the newest shards that can be read. Read again only when a shard was added or changed."""
    for shard in reversed(shards[-_NEWEST:]):
        try:
            tensors = read_shard(shard.path).tensors
        except (ShardError, OSError):
            continue
        steps = tensors.get(f"{LOSS}.step")
        values = tensors[LOSS][steps <= shard.last] if LOSS in tensors and steps is not None else ()
        if len(values):
            return float(values[-1])
    return None
