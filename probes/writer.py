"""Write a run from a thread of its own: take rows, seal them into shards, beat the heart, mark the end.

Training hands over a callable that yields rows once the device has them; it never waits here. A full queue drops the
hand-over and counts it. While the disk refuses, rows are kept; the disk is asked again until it takes them.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes import manifest as files
from probes import place as places
from probes.attempts import row_shape, run_mark
from probes.compacting import Behind
from probes.disk import Disk
from probes.jsonfile import write_json
from probes.life import beat
from probes.lost import Lost
from probes.manifest import Manifest
from probes.ranks import BEAT_SECONDS
from probes.shard import shard_name, write_shard
from probes.vocabulary import FORMAT_VERSION

if TYPE_CHECKING:
    from probes.remote.uploading import Upload

log = logging.getLogger("depthscope")

Row = tuple[str, int, np.ndarray]  # metric, step, value in its stored shape
Fetch = Callable[[], Iterable[Row]]

SEAL_SECONDS = 2.0
EARLY_SECONDS = 600.0
LATE_SEAL_SECONDS = 10.0

_QUEUE = 256
_PATIENCE = 60.0  # seconds that closing waits for a disk or a device that does not answer
_MOST_BYTES = 256 << 20  # held back at most while the disk refuses
_SHARD_BYTES = 32 << 20
_ROW_BYTES = 200  # what a row takes beside its numbers


class RunWriter:
    """The one writer of a run, or of an attempt that continues one. `put` from the training thread, `close` at the end."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        resume: bool = False,
        place: places.Place | None = None,
        upload: "Upload | None" = None,
    ):
        """Claim the folder, unless a `place` is given. Raises RunError when a run is there (and none to resume) or the disk
        refuses. `upload` sends it on to where it lives."""
        self.path = path
        self.missing: dict[str, dict] = {}  # metrics that could not be measured: from which step, and why
        self._manifest = manifest
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: list[Row] = []
        self._bytes = 0  # of the open rows
        self._complete = -1  # rows up to this step can be sealed: nothing more will be logged for it
        self._last_step = -1
        self._shards = 0  # sealed so far, and the number of the next one
        self._lost = Lost(manifest.every)
        self._warned: set[str] = set()
        self._end: dict = {}
        self._ended = False  # nothing more will be handed over
        # A SimpleQueue, because a signal's handler may put while training is putting.
        self._queue: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        if place is None and upload is not None:
            place = upload.take_place(manifest, resume)
        self._place = place or (places.resume if resume else places.begin)(path, manifest)
        self._upload = upload
        self._beat_seconds = BEAT_SECONDS if self._place.rank else files.HEARTBEAT_SECONDS
        self._disk = Disk(self._place)
        self._behind = Behind(self._place, manifest)
        self._started = self._beaten = time.monotonic()
        self._seal_at = self._started + SEAL_SECONDS
        self._thread = threading.Thread(target=self._work, name=f"depthscope writer {path.name}", daemon=True)
        self._thread.start()
        if upload is not None:
            upload.begin(self._place)

    @property
    def uploads(self) -> bool:
        """Whether the run is sent elsewhere when it is closed."""
        return self._upload is not None

    @property
    def shards(self) -> Path:
        """The folder this writer seals into."""
        return self._place.shards

    @property
    def attempt(self) -> int:
        return self._place.number

    @property
    def rank(self) -> int:
        return self._place.rank

    @property
    def created(self) -> float:
        """When the run was, seconds since 1970."""
        return self._place.created

    def reached(self, step: int) -> None:
        """Step `step` was recorded, though nothing of it is written here."""
        self._last_step = max(self._last_step, step)

    def lose(self, step: int, cause: str) -> None:
        """Nothing of step `step` can be written, because of `cause`."""
        self._lost.add([step], cause)

    @property
    def dropped(self) -> int:
        return self._lost.count

    def put(self, fetch: Fetch, complete: int | Callable[[], int]) -> bool:
        """Hand over rows, the last ones of steps up to `complete` (a function is asked when they have come).
        Never blocks: a full queue drops, and False is returned."""

        def take() -> Iterable[Row]:
            try:
                yield from fetch()
            except Exception as error:
                self._warn("fetch", f"depthscope could not take a step's numbers from the device: {error}.")
                self._lost.add([_step(complete)], f"its numbers could not be taken from the device ({error})")
            self._complete = max(self._complete, complete() if callable(complete) else complete)

        if self._queue.qsize() < _QUEUE:
            self._queue.put(take)
            return True
        self._lost.add([_step(complete)], "the writer could not keep up")
        return False

    def save(self, act: Callable[[], object]) -> str:
        """Write a file beside the shards, from within a `fetch`; why the disk refused, empty where it did not. Other errors
        of `act` are raised."""
        failed = []

        def attempt() -> None:
            try:
                act()
            except OSError:
                raise
            except Exception as error:
                failed.append(error)

        done = self._disk.do(attempt)
        if failed:
            raise failed[0]
        return "" if done else self._disk.refused

    def close(self, status: str, reason: str = "") -> None:
        """Seal everything handed over and mark the end. Waits for the thread, but not for ever."""
        self._end = {"status": status, "reason": reason}
        self._queue.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._warn("close", f"depthscope gave up waiting for {self.path}: its last steps may be missing.")
        if self._upload is not None:
            self._upload.close()

    # The thread

    def _work(self) -> None:
        while self._turn(0.2):
            if self._queue.empty() and not self._disk.refused:
                self._behind.work(self._turn)
        self._seal(None)
        if self._open:
            self._shed(len(self._open))
        end = {"time": time.time(), **self._end, "step": self._last_step, **self._told()}
        marked = self._disk.do(lambda: write_json(self._place.folder / files.END, end))
        said = [f"not recorded: {lost}"] if (lost := str(self._lost)) else []
        if not marked and not self._disk.gone:
            said.append("its end could not be marked, so that it will be shown as stopped")
        if said:
            where = self.path if self._upload is None else self._upload.address.shown
            self._warn("end", f"The run at {where} has ended; {'; and '.join(said)}.")
        if not self._disk.refused:
            self._behind.work(lambda: True)

    def _turn(self, patience: float = 0.0) -> bool:
        """Take what was handed over, waiting at most so many seconds for it; seal and beat when it is time. False when nothing
        more will come."""
        with contextlib.suppress(queue.Empty):
            for _ in range(max(1, self._queue.qsize())):
                fetch = self._queue.get(timeout=patience) if patience else self._queue.get_nowait()
                if fetch is None:
                    self._ended = True
                    break
                self._take(fetch)
        if self._ended:
            return False
        now = time.monotonic()
        if now >= self._seal_at:
            self._seal(self._complete)
            # A run is looked at most in its first minutes; later, fewer and larger shards.
            early = now - self._started < EARLY_SECONDS
            wait = SEAL_SECONDS if early else LATE_SEAL_SECONDS
            self._seal_at = time.monotonic() + (self._disk.wait if self._disk.refused else wait)
        if now - self._beaten >= self._beat_seconds:
            self._disk.do(lambda: beat(self._place.folder, self._last_step, **self._told()))
            self._beaten = now
            if self._place.resumed:
                self._warn("resumed", f"Another process has continued the run at {self.path} meanwhile.")
        return True

    def _told(self) -> dict:
        told = {"dropped": self.dropped, "shards": self._shards, "gaps": self._lost.gaps()}
        return told | ({"missing": dict(self.missing)} if self.missing else {})

    def _take(self, fetch: Fetch) -> None:
        try:
            for name, step, value in fetch():
                self._add(name, step, value)
        except Exception as error:
            self._warn("take", f"depthscope could not keep a step's numbers: {error}.")
            self._lost.count += 1
        if self._bytes > _MOST_BYTES:
            self._shed(len(self._open) // 2)

    def _add(self, name: str, step: int, value: np.ndarray) -> None:
        shape = self._shapes.setdefault(name, row_shape(name, self._manifest.layout))
        value = np.asarray(value, np.float32)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape} where {shape} belongs")
        self._open.append((name, step, value))
        self._bytes += _size(value)
        self._last_step = max(self._last_step, step)

    def _shed(self, count: int) -> None:
        """Let the `count` oldest rows go, and all others of their steps."""
        self._open.sort(key=itemgetter(1))
        last = self._open[count - 1][1]
        steps = [step for _, step, _ in self._open if step <= last]
        self._lost.add(steps, self._disk.refused or "the writer could not keep up", rows=len(steps))
        self._open = self._open[len(steps) :]
        self._bytes = sum(_size(value) for _, _, value in self._open)

    def _seal(self, complete: int | None) -> None:
        """Write the open rows up to step `complete` (None: all) as shards; keep them if the disk refuses."""
        if self._disk.gone and self._open:
            self._shed(len(self._open))
        ready = [row for row in self._open if complete is None or row[1] <= complete]
        later = [row for row in self._open if complete is not None and row[1] > complete]
        ready.sort(key=itemgetter(1))
        for piece in _pieces(ready):
            steps = [step for _, step, _ in piece]
            target = self._place.shards / shard_name(steps[0], steps[-1])
            about = {
                "format": str(FORMAT_VERSION),
                "run": run_mark(self._place.created),
                "rank": str(self._place.rank),
                "attempt": str(self._place.number),
                "shard": str(self._shards),
            }

            def seal(target=target, piece=piece, about=about) -> None:
                self._place.admit()
                write_shard(target, _tensors(piece), about)

            if not self._disk.do(seal):
                break
            self._shards += 1
            self._behind.sealed(piece)
            ready = ready[len(piece) :]
        self._open = ready + later
        self._bytes = sum(_size(value) for _, _, value in self._open)

    def _warn(self, what: str, sentence: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s", sentence)


def _step(complete: int | Callable[[], int]) -> int:
    """The step of a hand-over that says which steps it completes."""
    return complete() + 1 if callable(complete) else complete


def _size(value: np.ndarray) -> int:
    return value.nbytes + _ROW_BYTES


def _pieces(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows in order of their steps, cut into shards between two steps."""
    start = total = 0
    for place, (_, step, value) in enumerate(rows):
        if total > _SHARD_BYTES and step != rows[place - 1][1]:
            yield rows[start:place]
            start, total = place, 0
        total += _size(value)
    if start < len(rows):
        yield rows[start:]


def _tensors(rows: list[Row]) -> dict[str, np.ndarray]:
    """`<metric>` [n, ...] and `<metric>.step` int64 [n] for each metric of the rows."""
    found: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for name, step, value in rows:
        steps, values = found.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
    values = {name: np.stack(values) for name, (_, values) in found.items()}
    return values | {name + ".step": np.array(steps, np.int64) for name, (steps, _) in found.items()}
