"""Attempts: a run is recorded in one or several, each begun at a step of its own, each in a folder of its own.

The first attempt's folder is the run's. Where a later attempt began, the rows of earlier ones end: those steps were
trained again.
"""

import math
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

import numpy as np

from probes import elsewhere
from probes.careful import legible, printable, stamp
from probes.digest import FOLDER, Digest, DigestError
from probes.layout import Layout
from probes.life import Life
from probes.manifest import Manifest
from probes.ranks import rank_folder
from probes.series import Held, Stored, Stretch
from probes.shard import Shard, ShardError, UnreadableShard, read_shard, shard_names, shard_steps
from probes.statuses import Statuses
from probes.vocabulary import METRICS, MOST_STEP, TRIANGLES, metric

QUARANTINE = "quarantine"

_STEP = ".step"
_FOLDER = re.compile(r"attempt-([0-9]{5})")
_TOGETHER = 64  # shards fetched at once where they lie elsewhere

Part = tuple[np.ndarray, np.ndarray]  # steps int64 [n], values [n, ...]


class Attempt:
    """One recording of a run, from `step` on: its state, and the rows it sealed, those hidden by later ones too.

    `number` counts from 0; the rows are those of one `rank`, which as a rule is 0 and stands for all. `hidden_from` is the
    step at which a later attempt began, None if none did. `begun` is when the run was created, where `manifest` is not its own.
    """

    def __init__(self, run: Path, number: int, manifest: Manifest, rank: int = 0, begun: float | None = None):
        self.number, self.manifest, self.rank = number, manifest, rank
        self.begun = manifest.created if begun is None else begun
        self.folder = attempt_folder(run, number)
        self.shards = rank_folder(self.folder, rank)
        self.step = manifest.step
        self.hidden_from: int | None = None
        self.size = 0  # bytes on the disk
        self.held = 0  # and in memory
        self.parts: dict[str, dict[str, Part]] = {}  # rows in memory, by metric and shard
        self.digests: list[Digest] = []  # of shards whose rows are not in memory
        self.doubts: dict[
            Path, tuple[str, object]
        ] = {}  # digests that do not do: why, and which file that was
        self.sealed: dict[str, tuple[int | None, int, int]] = {}  # sound shards: number, first and last step
        self.sums: dict[str, str] = {}  # checksums of those that were only checked
        self.broken: dict[str, tuple[int, int, str]] = {}  # first and last step, and what is wrong
        self._broken: dict[str, object] = {}  # which files these were: one that is still copied changes
        self.unreadable: set[str] = set()  # those of them that may be sound
        self.quarantined: dict[str, tuple[int, int]] = {}
        self.told: dict = {}  # what it said last
        self.ended: tuple[str, str] = ("running", "")  # and how it was, when the shards were listed
        self._life = Life(self.shards if rank else self.folder, manifest.created)
        self.ranks = Statuses(self.folder, manifest.ranks, manifest.created)
        self._run = run
        self._layout: Layout | None = None
        self._looked_at: set[Path] = set()  # digests
        self._last: tuple[object, int] = None, -1

    def __repr__(self) -> str:
        hidden = "" if self.hidden_from is None else f", hidden from step {self.hidden_from}"
        return f"<Attempt {self.number} from step {self.step}: {self.status}{hidden}>"

    @property
    def about(self) -> dict[str, str]:
        """What a digest of its shards says it is of."""
        return {"created": repr(self.manifest.created), "attempt": str(self.number), "rank": str(self.rank)}

    @property
    def created(self) -> datetime:
        return datetime.fromtimestamp(self.manifest.created, UTC)

    @property
    def status(self) -> str:
        """ "running", "finished" or "stopped"; `status_reason` says why or since when."""
        return self._life.state()[0]

    @property
    def status_reason(self) -> str:
        return self._life.state()[1]

    @property
    def last_seen(self) -> datetime:
        return self._life.seen

    @property
    def received(self) -> int:
        """The last step the writer says it has received, sealed or not; -1 before the first."""
        step = self.told.get("step")
        return step if type(step) is int and 0 <= step <= MOST_STEP else -1

    @property
    def last_step(self) -> int:
        """The last visible step, -1 if there is none."""
        if self.hidden_from is None:
            return max((last for _, _, last in self.sealed.values()), default=-1)
        known = self.hidden_from, len(self.sealed)
        if self._last[0] != known:
            visible = [stretch.last for name in self.metrics for stretch in self.visible(name)]
            self._last = known, max(visible, default=-1)
        return self._last[1]

    @property
    def metrics(self) -> set[str]:
        """Names of what it recorded, hidden or not."""
        return {*list(self.parts), *(name for digest in list(self.digests) for name in digest.metrics)}

    def visible(self, name: str) -> Iterator[Stretch]:
        """The rows of a metric that no later attempt hides, in the order of their shards."""
        found: list[tuple[str, Stretch]] = [
            (shard, Held(*part)) for shard, part in list(self.parts.get(name, {}).items())
        ]
        if self.digests:
            found += [
                (digest.names[0], Stored(digest, name, direct=self._direct, doubt=self._doubt))
                for digest in list(self.digests)
                if name in digest.metrics
            ]
            found.sort(key=itemgetter(0))
        for _, stretch in found:
            shown = stretch if self.hidden_from is None else stretch.cut(self.hidden_from)
            if shown.rows:
                yield shown

    def refresh(self, layout: Layout, room: int | None, digests: Path | None = None) -> bool:
        """Read the shards sealed since the last look, as far as there is `room` [bytes] in memory for their rows.

        Those that a digest covers are not read; there may be some in the folder `digests` too. With `room` None all are
        read and checked, and nothing is kept.
        """
        # What it says first, and then what is there: in the other order a shard sealed between would be missed.
        self.ended, self.told = self._life.look()
        self._layout, folder = layout, self.shards
        names, new = shard_names(folder), False
        for place in (folder / FOLDER, digests) if room is not None else ():
            new |= place is not None and self.rely(names, place, layout)
        for name in self.broken.keys() - set(names):  # put aside, say
            del self.broken[name]
            new = True
        unread = [name for name in names if name not in self.sealed and self._readable(name)]
        for at, name in enumerate(unread):
            if at % _TOGETHER == 0:
                elsewhere.soon(folder / each for each in unread[at : at + _TOGETHER])
            seen = stamp(folder / name)
            try:
                shard = read_shard(folder / name)
                rows = self.rows(name, shard, layout)
                held = sum(_unpacked(each, *part, layout) for each, part in rows.items())
                if room is not None and held > room:
                    raise UnreadableShard("is left out, for the run would not fit into this machine's memory")
            except FileNotFoundError:
                continue
            except ShardError as error:
                new |= name not in self.broken
                self._break(name, error, seen)
                continue
            self.broken.pop(name, None)
            number = None if shard.number < 0 else shard.number
            self.sealed[name] = number, *shard_steps(name)
            self.size += shard.size
            if room is None:
                self.sums[name] = shard.crc32
            else:
                room -= held
                self.held += held
                for each, part in rows.items():
                    self.parts.setdefault(each, {})[name] = part
            new = True
        kept = quarantine_folder(self._run, self.number, self.rank)
        self.quarantined = {name: shard_steps(name) for name in shard_names(kept)}
        return new

    def rely(self, names: list[str], folder: Path, layout: Layout) -> bool:
        """Take the digests in a folder whose shards are all among these; their rows leave the memory. Whether there were any."""
        self._layout = layout
        paths = [folder / name for name in shard_names(folder)]
        unseen = [
            path
            for path in paths
            if path not in self._looked_at or (path in self.doubts and self.doubts[path][1] != stamp(path))
        ]
        if not unseen:
            return False
        there, new = set(names), False
        taken = {name for digest in self.digests for name in digest.names}
        for path in unseen:
            self._looked_at.add(path)
            self.doubts.pop(path, None)
            try:
                digest = Digest(path, self.shards)
            except FileNotFoundError:
                continue
            except DigestError as error:
                self._doubt(path, error)
                continue
            covered = set(digest.names)
            if covered - there:
                self._looked_at.discard(path)  # a shard may have been sealed since the folder was listed
                continue
            if covered & taken:
                continue
            if wrong := digest.misfit(self.about) or self._misfit(digest):
                self._doubt(path, wrong)
                continue
            self.digests.append(digest)
            taken |= covered
            for shard, name in zip(digest.shards, digest.names, strict=True):
                if name not in self.sealed:
                    self.size += shard.size
                self.broken.pop(name, None)
                number = None if shard.number < 0 else shard.number
                self.sealed[name] = number, shard.first, shard.last
                for each, parts in self.parts.items():
                    if (part := parts.pop(name, None)) is not None:
                        self.held -= _unpacked(each, *part, self._layout)
            new = True
        self.parts = {name: parts for name, parts in self.parts.items() if parts} if new else self.parts
        return new

    def _misfit(self, digest: Digest) -> str:
        """What sets its metrics apart from those of this model, in a clause; empty where nothing does."""
        for name, told in digest.metrics.items():
            if told.width != math.prod(row_shape(name, self._layout)):
                return f"holds {name} {told.width} wide, which does not fit run.json"
        return ""

    def _doubt(self, digest: Path, why: object) -> None:
        self.doubts[digest] = str(why), stamp(digest)

    @property
    def doubted(self) -> Iterator[str]:
        """A sentence on the run's own digests that do not do."""
        own = {
            path: why
            for path, (why, seen) in list(self.doubts.items())
            if path.parent == self.shards / FOLDER and seen == stamp(path)
        }
        if own:
            path, why = next(iter(own.items()))
            others = f", and {len(own) - 1} more do not fit either" if len(own) > 1 else ""
            yield (
                f"The digest {path.name} {why}{others}: the shards are read instead, which takes longer. "
                "Run depthscope compact."
            )

    def _direct(self, name: str, wanted: str) -> Part | None:
        """Rows of a metric in a shard whose digest does not do; None where it cannot be read either."""
        seen = stamp(self.shards / name)
        try:
            return self.rows(name, read_shard(self.shards / name), self._layout).get(wanted)
        except FileNotFoundError:
            return None
        except ShardError as error:
            self._break(name, error, seen)
            return None

    def _break(self, name: str, error: ShardError, seen: object) -> None:
        self.sealed.pop(name, None)
        self.broken[name] = *shard_steps(name), str(error)
        self._broken[name] = seen
        if isinstance(error, UnreadableShard):
            self.unreadable.add(name)

    def _readable(self, name: str) -> bool:
        """Whether a shard may be sound now: it was not looked at, could not be read, or is another file than the broken one."""
        return (
            name not in self.broken
            or name in self.unreadable
            or self._broken[name] != stamp(self.shards / name)
        )

    def rows(self, name: str, shard: Shard, layout: Layout) -> dict[str, Part]:
        """The rows in a shard of this name, by metric. Raises ShardError when it does not belong here."""
        # Of format 1, and of the first shards of format 2, nobody knows which run they are of.
        if shard.metadata.get("run", run_mark(self.begun)) != run_mark(self.begun):
            raise ShardError("is of another run, and was put here")
        place = {"rank": self.rank, "attempt": self.number}
        for what, number in place.items():
            if shard.metadata.get(what, str(number)) != str(number):
                raise ShardError(f"is of {what} {printable(shard.metadata[what], 20)}, and was put here")
        return rows_of(name, shard, layout)


def hide(attempts: list[Attempt]) -> None:
    """Let the rows of each attempt, given in order, end where a later one began."""
    limit = None
    for attempt in reversed(attempts):
        attempt.hidden_from = limit
        limit = attempt.step if limit is None else min(limit, attempt.step)


def run_mark(created: float) -> str:
    """What a shard says of the run it is of: when that was `created`, in the digits of run.json."""
    return repr(float(created))


def attempt_folder(run: Path, number: int) -> Path:
    return run / f"attempt-{number:05d}" if number else run


def quarantine_folder(run: Path, number: int, rank: int = 0) -> Path:
    """Where broken shards of an attempt are put aside."""
    below = run / QUARANTINE
    return rank_folder(attempt_folder(below, number) if number else below, rank)


def claimed(run: Path) -> list[int]:
    """Numbers of the attempts after the first that somebody has begun, or was about to."""
    try:
        names = [entry.name for entry in os.scandir(run)]
    except OSError:
        return []
    found = [_FOLDER.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in found if match is not None and int(match[1]))


def attempt_number(name: str) -> int:
    """The number of an attempt after the first by the name of its folder; 0 for other names."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found else 0


def rows_of(name: str, shard: Shard, layout: Layout) -> dict[str, Part]:
    """The rows in a shard of this name, by metric. Raises ShardError when one does not fit the name or the layout."""
    rows, steps_seen = {}, []
    for each, values in shard.tensors.items():
        if each.endswith(_STEP):
            continue
        if not legible(each):
            raise ShardError("holds a metric with a name that nobody can read")
        if each not in METRICS and (values.ndim != 1 or each + _STEP not in shard.tensors):
            continue  # of a later depthscope
        steps = shard.tensors.get(each + _STEP)
        if steps is None or steps.dtype != np.int64 or steps.shape != values.shape[:1]:
            raise ShardError(f"has no steps for {each!r}")
        if values.dtype.kind != "f" or values.shape[1:] != row_shape(each, layout):
            raise ShardError(f"holds {each} in shape {list(values.shape)}, which does not fit run.json")
        if (steps[1:] < steps[:-1]).any():
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        rows[each] = steps, values
        steps_seen.append(steps)
    first, last = shard_steps(name)
    there = np.concatenate(steps_seen) if steps_seen else np.empty(0, np.int64)
    if len(there) and (there.min() != first or there.max() != last or last > MOST_STEP):
        raise ShardError(f"holds steps {there.min()} to {there.max()}, which are not those of its name")
    return rows


def row_shape(name: str, layout: Layout) -> tuple[int, ...]:
    """Stored shape of one recorded step of a metric: triangles packed to one axis."""
    axes = metric(name).axes
    if axes in TRIANGLES:
        return (layout.cells(axes),)
    return tuple(layout.length(axis) for axis in axes)


def _unpacked(name: str, steps: np.ndarray, values: np.ndarray, layout: Layout) -> int:
    """Bytes of the rows of a metric as the reader gives them, and of their steps."""
    axes = metric(name).axes
    count = math.prod(map(layout.length, axes)) if axes in TRIANGLES else 1
    return steps.nbytes + 4 * max(values.size, len(values) * count)
