"""Snapshots: what a run holds at one moment, so that everything on a page is of that moment while the run grows."""

import copy
import threading
from datetime import datetime
from pathlib import Path

from app import cache
from probes import Run
from probes.attempts import Attempt


class Snapshot(Run):
    """A run as it was: it never looks at the disk again. Several threads may read it at once."""

    def __init__(self, run: Run, status: str, reason: str, seen: datetime):
        # Nothing is opened. A series is put together by the first who asks for it, for all snapshots until the run
        # grows: then `run` begins another table of them.
        self.__dict__.update(vars(run))
        self.attempts = [_as_it_is(attempt) for attempt in run.attempts]
        self._left_out = dict(run._left_out)
        self._state = status, reason, seen

    @property
    def status(self) -> str:
        return self._state[0]

    @property
    def status_reason(self) -> str:
        return self._state[1]

    @property
    def last_seen(self) -> datetime:
        return self._state[2]

    def refresh(self) -> bool:
        """Nothing is ever new here."""
        return False


class Followed:
    """A run that may grow, for all sessions: `look()` is what is there now."""

    def __init__(self, path: Path):
        self._turn = threading.Lock()
        self._run = Run(path, cache=cache.folder(path))

    def look(self) -> Snapshot:
        """What is there now; between two looks without a new shard nothing is read."""
        with self._turn:
            # Before the shards: a run that has ended by now has sealed them all.
            state = self._run.status, self._run.status_reason, self._run.last_seen
            self._run.refresh()
            return Snapshot(self._run, *state)


def _as_it_is(attempt: Attempt) -> Attempt:
    """The attempt, untouched by what is read later; the arrays in common."""
    kept = copy.copy(attempt)
    kept.parts = {name: dict(parts) for name, parts in attempt.parts.items()}
    kept.digests = list(attempt.digests)
    kept.sealed, kept.broken = dict(attempt.sealed), dict(attempt.broken)
    return kept
