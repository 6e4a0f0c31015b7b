"""Open a run and read it: metrics as numpy arrays, while it grows or long after. Needs no torch."""

import importlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from probes import compacting, elsewhere
from probes import manifest as files
from probes.attempts import Attempt, attempt_folder, claimed, hide, row_shape
from probes.attributed import Attribution, attribution_names, read_attribution
from probes.careful import is_folder, printable, stamp, visible
from probes.gaps import Gap, gaps_of
from probes.layout import Layout, difference
from probes.manifest import Manifest, RunError
from probes.ranks import MANIFEST as RANK
from probes.ranks import VALUES, rank_folder
from probes.series import Series
from probes.shard import ShardError
from probes.tokens import Tokens, read_tokens, token_steps

_MOST_PROBLEMS = 30

# The rows of one run may take half of this machine's memory; a stranger's run is no reason to take it all.
try:
    _MOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
except (AttributeError, ValueError, OSError):
    _MOST_MEMORY = 4 << 30


class Run:
    """One recorded run. Everything read is kept; `refresh()` picks up what was sealed since.

    `run.metrics` names what was recorded, `run.steps(name)` is int64 [N], `run[name]` float32 [N, ...] in the
    shapes of the vocabulary (read x source triangles unpacked, NaN where a source does not exist yet).

    `run.attempts` are its recordings, one more for each time it was resumed: where one began, the rows of those
    before end. Where several processes trained, `run.ranks` says how each is, and `run.manifest.ranks` what the rows
    stand for. `run.gaps` are the steps that are missing, and why; `run.problems` says all that in sentences.
    """

    def __init__(self, path: str | os.PathLike, rank: int = 0, *, cache: Path | None = None):
        """With a folder for a `cache`, a long run without a digest gets one there."""
        self.path, self.rank, self._cache = place_of(path), rank, cache
        elsewhere.look(self.path)
        if not (self.path / files.MANIFEST).exists() and (trouble := elsewhere.trouble(self.path)):
            raise RunError(trouble)
        self.manifest = _manifest(self.path, files.MANIFEST, rank)
        self._begun = Manifest.read(self.path).created if rank else self.manifest.created
        self.attempts: list[Attempt] = [Attempt(self.path, 0, self.manifest, rank, self._begun)]
        self._left_out: dict[int, tuple[str, object]] = {}  # why, and which files said so
        self._series: dict[str, Series] = {}
        self._whole: dict[str, np.ndarray] = {}
        self.kept: dict = {}  # what others made of its rows; emptied when there are more
        self._attributed: dict[str, Attribution | str] = {}
        self.refresh()

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}, step {self.last_step}, {len(self.metrics)} metrics>"

    # What the run is

    @property
    def name(self) -> str:
        return visible(self.path.resolve().name)

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
        elsewhere.signs(self.attempts[-1].folder)
        return self.attempts[-1].status

    @property
    def status_reason(self) -> str:
        return self.attempts[-1].status_reason

    @property
    def ranks(self) -> dict[int, tuple[str, str]]:
        """How each process of the last attempt is: "running", "finished", "stopped" or "missing", and why or since when.
        Empty where one process trained."""
        return self.attempts[-1].ranks.all()

    @property
    def last_seen(self) -> datetime:
        """Time of the end marker, else of the last heartbeat, else of creation."""
        return self.attempts[-1].last_seen

    @property
    def last_step(self) -> int:
        """The last recorded step, -1 before the first."""
        return max(attempt.last_step for attempt in self.attempts)

    @property
    def size(self) -> int:
        """Bytes of the shards that were read."""
        return sum(attempt.size for attempt in self.attempts)

    @property
    def gaps(self) -> list[Gap]:
        """Steps that are missing, and why, by step."""
        return gaps_of(self.attempts)

    @property
    def problems(self) -> list[str]:
        """A sentence for each gap, for each attempt that cannot be read, for processes that have stopped, and for digests
        that do not do."""
        ranks = self.attempts[-1].ranks.problems(self.status)
        doubted = [sentence for attempt in self.attempts for sentence in attempt.doubted]
        found = [*(why for why, _ in self._left_out.values()), *ranks, *doubted, *map(str, self.gaps)]
        more = len(found) - _MOST_PROBLEMS
        return found[:_MOST_PROBLEMS] + (
            [f"And {more} more like these: run depthscope check."] if more > 0 else []
        )

    # How it looks

    @property
    def plot(self):
        """Its charts, for a notebook: `run.plot.dilution()` is an `alt.Chart`; `app.notebook.Plot` has them all.

        Several runs in one chart: `app.plot([run, other]).dilution()`. Raises ImportError without the dashboard.
        """
        # By its name, when it is asked for: reading knows nothing of charts, and needs none of their libraries.
        app = importlib.import_module("app")
        if not getattr(app, "__depthscope__", False):
            raise ImportError(
                f"{getattr(app, '__file__', None) or 'The module app'} is not depthscope's app: rename it, or leave "
                "its folder, to draw."
            )
        return app.plot(self)

    # What it recorded

    @property
    def metrics(self) -> list[str]:
        names = {name for attempt in self.attempts for name in attempt.metrics}
        return sorted(name for name in names if name in self)

    def __contains__(self, name: str) -> bool:
        return name in self._series or any(True for attempt in self.attempts for _ in attempt.visible(name))

    def steps(self, name: str) -> np.ndarray:
        """Steps at which `name` was recorded, int64 [N], ascending; a scalar logged twice has its step twice.

        Raises KeyError for what was not recorded.
        """
        return self.series(name).steps

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of `name`, float32 [N, ...]. Raises KeyError for what was not recorded, RunError for more than fits into
        this machine's memory; `series` reads a part of them."""
        if name not in self._whole:
            series = self.series(name)
            if series.nbytes > _MOST_MEMORY:
                raise RunError(
                    f"All {len(series):,} rows of {name} do not fit into this machine's memory: read some of them, with "
                    f"run.series({name!r})."
                )
            values = series.whole()
            values.flags.writeable = False
            self._whole[name] = values
        return self._whole[name]

    def series(self, name: str) -> Series:
        """The rows of `name`, to read some of them, or bins: `run.series("hidden_rms").bins(2000)`. Raises KeyError for what
        was not recorded."""
        table = self._series
        if name not in table:
            parts = [part for attempt in self.attempts for part in attempt.visible(name)]
            if not parts:
                recorded = ", ".join(self.metrics) or "nothing yet"
                raise KeyError(f"{self.name} did not record {name!r}; it has: {recorded}")
            found = Series(name, parts, self.layout, row_shape(name, self.layout))
            for other in list(table.values()):
                found.share(other)
            table[name] = found
        return table[name]

    @property
    def token_steps(self) -> np.ndarray:
        """Steps at which the depth weights of single tokens were recorded, int64 [N], ascending."""
        return np.array(sorted(self._snapshots()), np.int64)

    def tokens(self, step: int | None = None) -> Tokens:
        """The depth weights of single tokens at `step`, or at the last step that has them; read from the disk.

        Raises KeyError where none were recorded, RunError for a file that cannot be trusted.
        """
        folders = self._snapshots()
        if not folders or (step is not None and step not in folders):
            recorded = (
                ", ".join(map(str, sorted(folders))) or "none at all: ask probes.record for tokens_every"
            )
            raise KeyError(f"{self.name} has no token snapshot at step {step}; it has: {recorded}")
        step = max(folders) if step is None else step
        try:
            return read_tokens(folders[step], step, self.layout)
        except (ShardError, FileNotFoundError) as error:
            raise RunError(f"The token snapshot of {self.name} at step {step} {error}.") from error

    def attributions(self) -> list[Attribution]:
        """What `depthscope attribute` found, by step; files that cannot be trusted are left out (`attribution_problems`)."""
        return [found for found in self._read_attributions() if isinstance(found, Attribution)]

    @property
    def attribution_problems(self) -> list[str]:
        """A sentence for each attribution that cannot be read."""
        return [found for found in self._read_attributions() if isinstance(found, str)]

    def _read_attributions(self) -> list[Attribution | str]:
        # A file is never changed: what was read is kept, unless it could not be.
        for name in (names := attribution_names(self.path)):
            if isinstance(self._attributed.get(name), Attribution):
                continue
            try:
                self._attributed[name] = read_attribution(self.path, name, self.layout)
            except (ShardError, FileNotFoundError) as error:
                self._attributed[name] = f"The attribution {name} is left out: it {error}."
        return [self._attributed[name] for name in names]

    def _snapshots(self) -> dict[int, Path]:
        """Folders of the visible ones, by step."""
        return {
            step: attempt.shards
            for attempt in self.attempts
            for step in token_steps(attempt.shards)
            if attempt.hidden_from is None or step < attempt.hidden_from
        }

    def refresh(self) -> bool:
        """Read the shards sealed since the last look. True if any is new. What cannot be read leaves a gap."""
        new = self._look_for_attempts()
        for attempt in self.attempts:
            room = _MOST_MEMORY - sum(each.held for each in self.attempts)
            digests = compacting.kept(attempt, self.layout, self._cache) if self._cache else None
            new |= attempt.refresh(self.layout, room, digests)
        if new:
            self._series, self._whole, self.kept = {}, {}, {}
        return new

    def _look_for_attempts(self) -> bool:
        elsewhere.look(self.path)
        known = {attempt.number for attempt in self.attempts}
        begun = []
        for number in claimed(self.path):
            folder = attempt_folder(self.path, number)
            # What is left out may have been half there, as while it was begun or copied.
            seen = stamp(folder), stamp(folder / files.ATTEMPT), stamp(rank_folder(folder, self.rank) / RANK)
            if number in known or self._left_out.get(number, ("", None))[1] == seen:
                continue
            self._left_out.pop(number, None)
            why = ""
            if not is_folder(folder):
                why = f"{folder.name} is left out: it is not a folder."
            elif (folder / files.ATTEMPT).exists():  # else it has not begun yet
                try:
                    manifest = _manifest(folder, files.ATTEMPT, self.rank)
                except RunError as error:
                    why = f"An attempt is left out. {error}"
                else:
                    if other := difference(self.layout, manifest.layout):
                        why = f"Attempt {number} is left out: it is of another model, for {other}."
                    else:
                        begun.append(Attempt(self.path, number, manifest, self.rank, self._begun))
            if why:
                self._left_out[number] = why, seen
        self.attempts = sorted([*self.attempts, *begun], key=lambda attempt: attempt.number)
        hide(self.attempts)
        return bool(begun)


def place_of(path: str | os.PathLike) -> Path:
    """The folder that a path names; that of an address shadows it, and is filled as it is read. Raises RunError."""
    if ":/" not in os.fspath(path):
        return Path(path)
    from probes import remote

    return remote.local(path)


def open_run(path: str | os.PathLike, rank: int = 0) -> Run:
    """Open the run recorded at `path`, a folder or an address like s3://bucket/runs/a: its rows, or with a `rank` those of one
    of the processes that recorded each its own.

    Raises RunError when there is none or it is unreadable.
    """
    return Run(path, rank)


def _manifest(folder: Path, name: str, rank: int) -> Manifest:
    """What an attempt's manifest says, or that of another rank than 0. Raises RunError."""
    manifest = Manifest.read(folder, name)
    if not rank:
        return manifest
    own = rank_folder(folder, rank)
    if not is_folder(own):
        raise RunError(
            f"{printable(folder)} has no rank {rank}: it was recorded by {manifest.ranks.world} processes, "
            f"{VALUES.get(manifest.ranks.values, 'in a way of its own')}."
        )
    return Manifest.read(own, RANK) if (own / RANK).exists() else manifest


def list_runs(root: str | os.PathLike) -> Iterator[Run]:
    """Every readable run at or below `root`, by path. Raises RunError when `root` is not a folder.

    Folders that hold an unreadable run.json are passed over: open_run says what is wrong with them.
    """
    root = place_of(root)
    paths = find_runs(root)
    if not root.is_dir():
        there_is_none = f"There is no folder {elsewhere.shown(root)}: give a folder that holds runs."
        raise RunError(elsewhere.trouble(root) or there_is_none)
    for path in paths:
        try:
            yield Run(path)
        except RunError:
            continue


def find_runs(root: Path) -> list[Path]:
    """Folders at or below `root` that hold a run.json, sorted. Links are not followed, nor runs entered."""
    elsewhere.find(root)
    found = []
    for folder, below, names in os.walk(root):
        if files.MANIFEST in names:
            found.append(Path(folder))
            below.clear()
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))
    return sorted(found)
