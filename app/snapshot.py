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

    def _state(self) -> tuple[str, str]:
        return self._then


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
    kept = copy.copy(run)
    for name, value in vars(run).items():
        if isinstance(value, dict):
            value = {key: copy.copy(part) if isinstance(part, list) else part for key, part in value.items()}
        setattr(kept, name, copy.copy(value) if isinstance(value, list | set) else value)
    return kept
