"""Series: all rows of one metric, read as far as they are asked for: some rows, or the bins that a chart has room for."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probes import pyramid
from probes.digest import Digest, DigestError
from probes.layout import Layout
from probes.pyramid import Bins
from probes.vocabulary import TRIANGLES, metric


class Held:
    """Rows in memory: steps int64 [n] ascending, values [n, ...]."""

    def __init__(self, steps: np.ndarray, values: np.ndarray):
        self.steps, self._values = steps, values.reshape(len(values), math.prod(values.shape[1:]))
        self.rows = len(steps)
        self.first, self.last = (int(steps[0]), int(steps[-1])) if len(steps) else (0, 0)

    def values(self, index: np.ndarray | None = None) -> np.ndarray:
        return np.asarray(self._values if index is None else self._values[index], np.float32)

    def bins(self, start: int, stop: int, top: int, columns: np.ndarray | None) -> list[Bins]:
        values = self._values[start:stop]
        found = pyramid.of_rows(np.asarray(values if columns is None else values[:, columns], np.float32))
        for _ in range(top):
            found = pyramid.folded(found)
        return [found]

    def cut(self, limit: int) -> "Held":
        """The rows of steps below `limit`."""
        shown = int(np.searchsorted(self.steps, limit))
        return self if shown == self.rows else Held(self.steps[:shown], self._values[:shown])


class Stored:
    """The first `rows` rows of a metric in the shards that a digest covers; where that does not do, the shards are read."""

    def __init__(self, digest: Digest, name: str, rows: int | None = None, direct=None, doubt=None):
        told = digest.metrics[name]
        self._digest, self._name, self._all = digest, name, told.rows
        self._direct = direct  # reads rows of a metric from a shard of this name
        self._doubt = doubt  # is told of a digest that does not do
        self._instead: Held | None = None
        self.rows = told.rows if rows is None else rows
        self.first = told.first
        self.last = told.last if self.rows == told.rows else int(self.steps[-1]) if self.rows else 0

    @cached_property
    def steps(self) -> np.ndarray:
        return self._try(lambda: self._digest.steps(self._name), lambda held: held.steps)[: self.rows]

    def values(self, index: np.ndarray | None = None) -> np.ndarray:
        index = np.arange(self.rows) if index is None else index
        return self._try(lambda: self._digest.values(self._name, index), lambda held: held.values(index))

    def bins(self, start: int, stop: int, top: int, columns: np.ndarray | None) -> list[Bins]:
        return self._try(
            lambda: [
                self._digest.bins(self._name, level, first, last, columns)
                for level, first, last in pyramid.cover(
                    start, stop, self._all, min(top, pyramid.depth(self._all))
                )
            ],
            lambda held: held.bins(start, stop, top, columns),
        )

    def cut(self, limit: int) -> "Stored":
        """The rows of steps below `limit`."""
        if self.last < limit:
            return self
        shown = int(np.searchsorted(self.steps, limit)) if self.first < limit else 0
        return Stored(self._digest, self._name, shown, self._direct, self._doubt)

    def _try(self, ask, otherwise):
        if self._instead is None:
            try:
                return ask()
            except DigestError as error:
                self._doubt(self._digest.path, error)
                self._instead = self._read()
        return otherwise(self._instead)

    def _read(self) -> Held:
        """The rows as the shards have them; those of a shard that is gone are blank."""
        told = self._digest.metrics[self._name]
        parts = [part for name in self._digest.names if (part := self._direct(name, self._name)) is not None]
        steps = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
        values = np.concatenate(
            [np.empty((0, told.width), np.float32), *(part[1].reshape(-1, told.width) for part in parts)]
        )
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        if len(steps) != self._all:
            try:
                known = self._digest.steps(self._name)
            except DigestError:
                known = np.full(self._all, told.last, np.int64)
                known[: len(steps)] = steps[: self._all]
            within = np.arange(len(steps)) - np.searchsorted(steps, steps)
            at = np.searchsorted(known, steps) + within
            fits = at < self._all
            blank = np.full((self._all, told.width), np.nan, np.float32)
            blank[at[fits]] = values[fits]
            steps, values = known, blank
        return Held(steps, values)


Stretch = Held | Stored


@dataclass(frozen=True)
class Binned(Bins):
    """Bins of a series, each with its place: `start` int64 [b] is the number of its first row, `first` and `last` are the
    steps of its first and its last row. `low`, `mean`, `high` and `nonfinite` are [b, ...] in the metric's shape."""

    start: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Series:
    """Rows of one metric in order of their steps. Nothing is read before it is asked for."""

    def __init__(self, name: str, stretches: Sequence[Stretch], layout: Layout, shape: tuple[int, ...]):
        self.name, self._layout, self._shape = name, layout, shape
        self._stretches = _ordered(_together(stretches))
        self._ends = np.cumsum([stretch.rows for stretch in self._stretches])
        self._steps: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def steps(self) -> np.ndarray:
        """int64 [N], ascending."""
        if self._steps is None:
            self._steps = np.concatenate([stretch.steps for stretch in self._stretches])
            self._steps.flags.writeable = False
        return self._steps

    def share(self, other: "Series") -> None:
        """Keep the steps of another metric for ours where they are the same."""
        if len(self) == len(other) and other._steps is not None and np.array_equal(self.steps, other._steps):
            self._steps = other._steps

    @property
    def width(self) -> int:
        """Numbers of a row as it is stored."""
        return int(np.prod(self._shape))

    @property
    def nbytes(self) -> int:
        """What all rows take, unpacked."""
        return 4 * len(self) * int(np.prod(self.shaped(np.empty((0, self.width), np.float32)).shape[1:]))

    def at(self, index: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 [n, ...]: the rows of these numbers, triangles unpacked."""
        index = np.asarray(index, np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows")
        found = np.empty((len(index), self.width), np.float32)
        which = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(which):
            stretch, here = self._stretches[number], which == number
            found[here] = stretch.values(index[here] - (self._ends[number] - stretch.rows))
        return self.shaped(found)

    def whole(self) -> np.ndarray:
        """float32 [N, ...]: all rows, triangles unpacked."""
        parts = [stretch.values() for stretch in self._stretches]
        return self.shaped(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def bins(
        self,
        most: int,
        first: int | None = None,
        last: int | None = None,
        columns: Sequence[int] | None = None,
        cuts: Iterable[int] = (),
    ) -> Binned:
        """At most `most` bins of about as many rows each, of the steps `first` to `last` (both included, all without).

        A bin is a row where there are not more. `columns` are those of the row as it is stored; the bins are [b, k] then.
        No bin reaches across a row in `cuts`. Nothing is left out: an extreme of the rows is one of the bins.
        """
        start = 0 if first is None else int(np.searchsorted(self.steps, first))
        stop = len(self) if last is None else int(np.searchsorted(self.steps, last, side="right"))
        return self.between(start, stop, most, columns, cuts)

    def between(
        self,
        start: int,
        stop: int,
        most: int,
        columns: Sequence[int] | None = None,
        cuts: Iterable[int] = (),
    ) -> Binned:
        """The same of the rows `start` to `stop`."""
        chosen = None if columns is None else np.asarray(columns, np.int64)
        cuts = sorted(cut for cut in set(map(int, cuts)) if start < cut < stop)
        top = pyramid.level_for(stop - start, most)
        parts = []
        for begin, end in zip([start, *cuts], [*cuts, stop], strict=True):
            for number, stretch in enumerate(self._stretches):
                offset = int(self._ends[number]) - stretch.rows
                low, high = max(begin - offset, 0), min(end - offset, stretch.rows)
                if low < high:
                    parts += stretch.bins(low, high, top, chosen)
        if not parts:
            width = self.width if chosen is None else len(chosen)
            parts = [pyramid.of_rows(np.empty((0, width), np.float32))]
        bins = pyramid.joined(parts)
        if len(bins) > most or cuts:
            starts = pyramid.groups(bins.count, most, np.array(cuts, np.int64) - start)
            bins = pyramid.merged(bins, starts)
        begins = start + np.cumsum(bins.count) - bins.count
        shaped = self.shaped if chosen is None else lambda part: part
        ends = begins + bins.count - 1
        low, mean, high = (np.asarray(part, np.float32) for part in (bins.low, bins.mean, bins.high))
        parts = map(shaped, (low, mean, high, bins.nonfinite))
        return Binned(bins.count, *parts, begins, self.steps[begins], self.steps[ends])

    def first(self, test: Callable[[Binned], np.ndarray]) -> int | None:
        """The number of the first row for which `test` is true of any entry, None if none. It is asked of bins [b, ...] first,
        and of those that pass row by row."""
        start, stop, begin, count = 0, len(self), 0, 0
        while stop > start:
            bins = self.between(start, stop, 1000)
            passed = np.asarray(test(bins)).reshape(len(bins), -1).any(axis=1)
            if not passed.any():
                return None
            at = int(np.argmax(passed))
            begin, count = int(bins.start[at]), int(bins.count[at])
            if count == 1:
                break
            start, stop = begin, begin + count
        return begin if count else None

    def shaped(self, flat: np.ndarray) -> np.ndarray:
        """[n, width] as the reader gives it: triangles unpacked, NaN where a source does not exist."""
        axes = metric(self.name).axes
        if axes in TRIANGLES:
            return self._layout.unpack(flat, axes)
        return flat.reshape(len(flat), *self._shape)


def _together(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Neighbours in memory as one."""
    found: list[Stretch] = []
    held: list[Held] = []
    for stretch in [*stretches, None]:
        if isinstance(stretch, Held):
            held.append(stretch)
            continue
        if held:
            steps, values = [one.steps for one in held], [one.values() for one in held]
            found.append(held[0] if len(held) == 1 else Held(np.concatenate(steps), np.concatenate(values)))
            held = []
        if stretch is not None:
            found.append(stretch)
    return found


def _ordered(stretches: list[Stretch]) -> list[Stretch]:
    """The stretches, or one of all their rows sorted, where one reaches behind the next or is not in order itself."""
    sound = all(a.last <= b.first for a, b in itertools.pairwise(stretches))
    sound &= all(not (s.steps[1:] < s.steps[:-1]).any() for s in stretches if isinstance(s, Held))
    if sound:
        return stretches
    steps = np.concatenate([stretch.steps for stretch in stretches])
    order = np.argsort(steps, kind="stable")
    return [Held(steps[order], np.concatenate([stretch.values() for stretch in stretches])[order])]
