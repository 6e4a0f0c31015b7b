"""Snapshots: what a run holds at one moment, so that everything on a page is of that moment while the run grows."""

import copy
import threading
from pathlib import Path

from probes import Run


class Snapshot(Run):
    """A run as it was: it never looks at the disk again. Several threads may read it at once."""

    def __init__(self, run: Run, state: tuple[str, str]):
        # Nothing is opened: it shares what `run` has read. A series is put together at the first who asks for it.
        self.__dict__.update(run.__dict__)
        self._then = state

    def refresh(self) -> bool:
        """Nothing is ever new here."""
        return False

    @property
    def status(self) -> str:
        return self._then[0]

    @property
    def status_reason(self) -> str:
        return self._then[1]


class Followed:
    """A run that may grow, for all sessions: `look()` is what is there now."""

    def __init__(self, path: Path):
        self._turn = threading.Lock()
        self._run = Run(path)
        self._kept = _kept(self._run)

    def look(self) -> Snapshot:
        """What is there now; between two looks without a new shard nothing is read or copied."""
        with self._turn:
            # Before the shards: a run that has ended by now has sealed them all.
            state = self._run.status, self._run.status_reason
            if self._run.refresh():
                self._kept = _kept(self._run)
            return Snapshot(self._kept, state)


def _kept(run: Run) -> Run:
    """The run as it is, untouched by what it reads later: its own lists and tables, the arrays in common."""
    kept = _apart(run)
    kept.attempts = [_apart(attempt) for attempt in run.attempts]
    return kept


def _apart(of: object) -> object:
    """A copy with its own lists and tables, and lists in tables."""
    found = copy.copy(of)
    for name, value in vars(of).items():
        if isinstance(value, dict):
            value = {key: copy.copy(part) if isinstance(part, list) else part for key, part in value.items()}
        setattr(found, name, copy.copy(value) if isinstance(value, list | set) else value)
    return found
