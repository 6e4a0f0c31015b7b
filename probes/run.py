"""Open a run and read it: metrics as numpy arrays, while it grows or long after. Needs no torch."""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from probes import manifest as files
from probes.layout import Layout
from probes.manifest import Manifest, RunError
from probes.shard import SUFFIX, ShardError, read_shard, shard_steps
from probes.vocabulary import TRIANGLES, metric

_STEP = ".step"


class Run:
    """One recorded run. Everything read is kept; `refresh()` picks up what was sealed since.

    `problems` holds a sentence for each shard that could not be read.

    `run.metrics` names what was recorded, `run.steps(name)` is int64 [N], `run[name]` float32 [N, ...] in the
    shapes of the vocabulary (read x source triangles unpacked, NaN where a source does not exist yet).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.problems: list[str] = []
        self._seen: set[str] = set()
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._whole: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.size = 0
        self.refresh()

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}, step {self.last_step}, {len(self.metrics)} metrics>"

    # What the run is

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def layers(self):
        return self.layout.layers

    @property
    def reads(self):
        return self.layout.reads

    @property
    def sources(self):
        return self.layout.sources

    @property
    def config(self) -> dict:
        return self.manifest.config

    @property
    def tags(self) -> tuple[str, ...]:
        return self.manifest.tags

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.manifest.created, UTC)

    # How it is

    @property
    def status(self) -> str:
        """ "running", "finished" or "stopped"; `status_reason` says why or since when."""
        return self._state()[0]

    @property
    def status_reason(self) -> str:
        return self._state()[1]

    @property
    def last_seen(self) -> datetime:
        """Time of the end marker, else of the last heartbeat, else of creation."""
        for name in (files.END, files.HEARTBEAT):
            moment = (files.read_json(self.path / name) or {}).get("time")
            # A damaged file may hold anything.
            with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
                return datetime.fromtimestamp(moment, UTC)
        return self.created

    @property
    def last_step(self) -> int:
        """The last recorded step, -1 before the first."""
        return max((int(self.steps(name)[-1]) for name in self.metrics), default=-1)

    def _state(self) -> tuple[str, str]:
        end = files.read_json(self.path / files.END)
        if end is not None:
            status = "finished" if end.get("status") == "finished" else "stopped"
            return status, str(end.get("reason") or "")
        seen = self.last_seen
        if time.time() - seen.timestamp() <= files.SILENT_SECONDS:
            return "running", ""
        return "stopped", f"no sign of life since {seen:%Y-%m-%d %H:%M:%S} UTC, and no end marker"

    # What it recorded

    @property
    def metrics(self) -> list[str]:
        return sorted(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def steps(self, name: str) -> np.ndarray:
        """Steps at which `name` was recorded, int64 [N], ascending; a scalar logged twice has its step twice.

        Raises KeyError for what was not recorded.
        """
        return self._series(name)[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of `name`, float32 [N, ...]. Raises KeyError for what was not recorded."""
        return self._series(name)[1]

    def _series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._parts:
            recorded = ", ".join(self.metrics) or "nothing yet"
            raise KeyError(f"{self.name} did not record {name!r}; it has: {recorded}")
        if name not in self._whole:
            parts = self._parts[name]
            steps = np.concatenate([part[0] for part in parts])
            values = np.concatenate([part[1] for part in parts]).astype(np.float32, copy=False)
            if (axes := metric(name).axes) in TRIANGLES:
                values = self.layout.unpack(values, axes)
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
            steps.flags.writeable = values.flags.writeable = False
            self._whole[name] = steps, values
        return self._whole[name]

    def refresh(self) -> bool:
        """Read the shards sealed since the last look. True if any is new. Broken ones go to `problems`."""
        new = False
        folder = self.path / files.RANK_FOLDER
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX))
        except FileNotFoundError:
            return False
        for name in names:
            if name in self._seen or shard_steps(name) is None:
                continue
            try:
                tensors = read_shard(folder / name)
                self._take(tensors)
                self.size += (folder / name).stat().st_size
            except FileNotFoundError:
                continue
            except ShardError as error:
                first, last = shard_steps(name)
                self.problems.append(f"Steps {first} to {last} are missing: shard {name} {error}.")
            self._seen.add(name)
            new = True
        return new

    def _take(self, tensors: dict[str, np.ndarray]) -> None:
        """Add a shard's rows, or none of them when any metric does not fit the layout."""
        rows = {}
        for name, values in tensors.items():
            if name.endswith(_STEP):
                continue
            steps = tensors.get(name + _STEP)
            if steps is None or steps.dtype != np.int64 or steps.shape != values.shape[:1] or not values.ndim:
                raise ShardError(f"has no steps for {name}")
            if values.shape[1:] != row_shape(name, self.layout):
                raise ShardError(f"holds {name} in shape {list(values.shape)}, which does not fit run.json")
            rows[name] = steps, values
        for name, part in rows.items():
            self._parts.setdefault(name, []).append(part)
            self._whole.pop(name, None)


def row_shape(name: str, layout: Layout) -> tuple[int, ...]:
    """Stored shape of one recorded step of a metric: triangles packed to one axis."""
    axes = metric(name).axes
    if axes in TRIANGLES:
        return (int(layout.triangle(axes).sum()),)
    return tuple(layout.length(axis) for axis in axes)


def open_run(path: str | os.PathLike) -> Run:
    """Open the run recorded at `path`. Raises RunError when there is none or it is unreadable."""
    return Run(path)


def list_runs(root: str | os.PathLike) -> Iterator[Run]:
    """Every readable run at or below `root`, by path. Raises RunError when `root` is not a folder.

    Folders that hold an unreadable run.json are passed over: open_run says what is wrong with them.
    """
    root = Path(root)
    if not root.is_dir():
        raise RunError(f"There is no folder {root}: give a folder that holds runs.")
    for path in find_runs(root):
        try:
            yield Run(path)
        except RunError:
            continue


def find_runs(root: Path) -> list[Path]:
    """Folders at or below `root` that hold a run.json, sorted. Links are not followed, nor runs entered."""
    found = []
    for folder, below, names in os.walk(root):
        if files.MANIFEST in names:
            found.append(Path(folder))
            below.clear()
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))
    return sorted(found)
