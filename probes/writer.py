"""Write a run from a thread of its own: take rows, seal them into shards, beat the heart, mark the end.

Training hands over a callable that yields rows once the device has them; it never waits here. A full queue
drops the hand-over and counts it.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from itertools import compress
from pathlib import Path

import numpy as np

from probes import manifest as files
from probes.manifest import Manifest, RunError
from probes.run import row_shape
from probes.shard import shard_name, write_shard
from probes.vocabulary import FORMAT_VERSION

log = logging.getLogger("depthscope")

Row = tuple[str, int, np.ndarray]  # metric, step, value in its stored shape
Fetch = Callable[[], Iterable[Row]]

SEAL_SECONDS = 2.0
EARLY_SECONDS = 600.0
LATE_SEAL_SECONDS = 10.0

_QUEUE = 256
_PATIENCE = 60.0  # seconds that closing waits for a disk or a device that does not answer
_KEPT_ROWS = 100_000  # held back at most while the disk refuses


class RunWriter:
    """The one writer of a run directory. `put` from the training thread, `close` at the end."""

    def __init__(self, path: Path, manifest: Manifest):
        """Create the folder and write run.json. Raises RunError when a run is there or the disk refuses."""
        self.path = path
        self.dropped = 0
        self.missing: dict[str, dict] = {}  # metrics that could not be measured: from which step, and why
        self._manifest = manifest
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, tuple[list[int], list[np.ndarray]]] = {}
        self._complete = -1  # rows up to this step can be sealed: nothing more will be logged for it
        self._last_step = -1
        self._warned: set[str] = set()
        # A SimpleQueue, because a signal's handler may put while training is putting.
        self._queue: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        _create(path, manifest)
        self._started = self._sealed = self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"depthscope writer {path.name}", daemon=True)
        self._thread.start()

    def put(self, fetch: Fetch, complete: int | Callable[[], int]) -> bool:
        """Hand over rows, the last ones of steps up to `complete` (a function is asked when they have come).
        Never blocks: a full queue drops, and False is returned."""

        def take() -> Iterable[Row]:
            yield from fetch()
            self._complete = max(self._complete, complete() if callable(complete) else complete)

        if self._queue.qsize() < _QUEUE:
            self._queue.put(take)
            return True
        self.dropped += 1
        return False

    def close(self, status: str, reason: str = "") -> None:
        """Seal everything handed over and mark the end. Waits for the thread, but not for ever."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(_PATIENCE)
        end = {"time": time.time(), "status": status, "reason": reason, "step": self._last_step}
        with self._failing("mark the end of the run"):
            files.write_json(self.path / files.END, {**end, **self._trouble()})

    def _trouble(self) -> dict:
        return {"dropped": self.dropped} | ({"missing": dict(self.missing)} if self.missing else {})

    # The thread

    def _work(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                fetch = self._queue.get(timeout=0.2)
                if fetch is None:
                    break
                self._take(fetch)
            now = time.monotonic()
            # A run is looked at most in its first minutes; later, fewer and larger shards.
            early = now - self._started < EARLY_SECONDS
            if now - self._sealed >= (SEAL_SECONDS if early else LATE_SEAL_SECONDS):
                self._seal(self._complete)
                self._sealed = now
            if now - self._beaten >= files.HEARTBEAT_SECONDS:
                with self._failing("write its heartbeat"):
                    files.beat(self.path, self._last_step, **self._trouble())
                self._beaten = now
        self._seal(None)

    def _take(self, fetch: Fetch) -> None:
        try:
            for name, step, value in fetch():
                self._add(name, step, value)
        except Exception as error:
            self.dropped += 1
            self._warn("take a step's numbers from the device", error)

    def _add(self, name: str, step: int, value: np.ndarray) -> None:
        shape = self._shapes.setdefault(name, row_shape(name, self._manifest.layout))
        value = np.asarray(value, np.float32)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape} where {shape} belongs")
        steps, values = self._open.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
        self._last_step = max(self._last_step, step)
        if len(steps) > _KEPT_ROWS:
            del steps[: _KEPT_ROWS // 2], values[: _KEPT_ROWS // 2]
            self.dropped += _KEPT_ROWS // 2

    def _seal(self, complete: int | None) -> None:
        """Write the open rows up to step `complete` (None: all) as a shard; keep them if the disk refuses."""
        tensors, kept = {}, {}
        for name, (steps, values) in self._open.items():
            ready = np.array([complete is None or step <= complete for step in steps])
            if ready.any():
                tensors[name] = np.stack(list(compress(values, ready)))
                tensors[name + ".step"] = np.array(steps, np.int64)[ready]
            if not ready.all():
                kept[name] = list(compress(steps, ~ready)), list(compress(values, ~ready))
        if not tensors:
            return
        sealed = np.concatenate([value for name, value in tensors.items() if name.endswith(".step")])
        target = self.path / files.RANK_FOLDER / shard_name(int(sealed.min()), int(sealed.max()))
        with self._failing("seal a shard"):
            write_shard(target, tensors, {"format": str(FORMAT_VERSION), "rank": "0"})
            self._open = kept

    @contextlib.contextmanager
    def _failing(self, what: str):
        """Trouble, as a rule the disk's, is said once and never stops training."""
        try:
            yield
        except Exception as error:
            self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("depthscope could not %s at %s: %s. Training goes on.", what, self.path, error)


def _create(path: Path, manifest: Manifest) -> None:
    if (path / files.MANIFEST).exists():
        raise RunError(
            f"{path} already holds a run: give another path, or delete that folder to record anew."
        )
    try:
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"{path} is not empty: give a new folder for the run.")
        (path / files.RANK_FOLDER).mkdir(parents=True)
        files.beat(path, -1)
        # run.json last: with it the folder becomes a run, and by then everything else is there.
        files.write_json(path / files.MANIFEST, manifest.to_json())
    except OSError as error:
        raise RunError(f"The run cannot be recorded at {path}: {error.strerror or error}.") from error
