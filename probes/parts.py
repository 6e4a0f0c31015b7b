"""Parts of an attribution that are done, in a file beside its result: an interrupted one goes on from there."""

import contextlib
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np

from probes.shard import ShardError, read_shard, write_shard

SECONDS = 5.0  # between two writings
DONE = "|done"  # ends the name of what says that a part is complete: before that it is not worth writing


class Parts(MutableMapping[str, np.ndarray]):
    """Arrays by name. What the file held is there again; what cannot be trusted is left out. Written every few seconds
    and when it is closed, removed by `finish`."""

    def __init__(self, path: Path):
        self._path, self._held = path, {}
        with contextlib.suppress(ShardError, FileNotFoundError):
            self._held = dict(read_shard(path).tensors)
        self._written = time.monotonic()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error) -> None:
        if len(self._held) > 1:  # more than the plan
            self._write()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._held[name]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self._held[name] = value
        if name.endswith(DONE) and time.monotonic() - self._written > SECONDS:
            self._write()

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)

    def finish(self) -> None:
        """Everything is in the result now."""
        self._held = {}
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        aside = self._path.with_name(f"{self._path.name}.new")
        aside.unlink(missing_ok=True)
        write_shard(aside, self._held, {})
        aside.replace(self._path)
        self._written = time.monotonic()
