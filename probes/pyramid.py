"""The pyramid of a series: minimum, mean and maximum of every 8, 64, 512, … rows, so that a spike is seen from afar."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FACTOR = 8  # 3/7 of the rows' bytes in all; with a factor of 4 it would be as many as the rows have


@dataclass(frozen=True)
class Bins:
    """`count` int64 [b] rows in each bin, one after the other; of their finite values in each of w columns the least,
    the mean and the greatest, [b, w], NaN where there are none; and `nonfinite` [b, w]: how many are not finite."""

    count: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    nonfinite: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, which: slice) -> "Bins":
        return Bins(*(part[which] for part in self.parts()))

    def parts(self) -> tuple[np.ndarray, ...]:
        return self.count, self.low, self.mean, self.high, self.nonfinite


def of_rows(values: np.ndarray) -> Bins:
    """Each row of [n, w] as a bin of its own."""
    known = np.isfinite(values)
    if not known.all():
        values = np.where(known, values, np.nan)
    count = np.ones(len(values), np.int64)
    return Bins(count, values, values, values, (~known).astype(np.int32))


def joined(parts: Sequence[Bins]) -> Bins:
    """Bins of one stretch after those of another."""
    if len(parts) == 1:
        return parts[0]
    return Bins(*map(np.concatenate, zip(*(part.parts() for part in parts), strict=True)))


def folded(bins: Bins) -> Bins:
    """Every eight bins as one, the last of what is left."""
    whole = len(bins) // FACTOR * FACTOR
    parts = []
    if whole:
        parts.append(_folded(bins[:whole], FACTOR))
    if whole < len(bins):
        parts.append(_folded(bins[whole:], len(bins) - whole))
    return joined(parts) if parts else bins


def merged(bins: Bins, starts: np.ndarray) -> Bins:
    """Bins put together, from each of `starts` up to the next."""
    known = bins.count[:, None] - bins.nonfinite
    total = np.where(known > 0, bins.mean, 0) * known.astype(np.float64)
    count, bad = np.add.reduceat(bins.count, starts), np.add.reduceat(bins.nonfinite, starts, axis=0)
    return Bins(
        count,
        np.fmin.reduceat(bins.low, starts, axis=0),
        _mean(np.add.reduceat(total, starts, axis=0), count[:, None] - bad),
        np.fmax.reduceat(bins.high, starts, axis=0),
        bad,
    )


def levels(values: np.ndarray) -> Iterator[Bins]:
    """Level 1, 2, … of the rows [n, w], up to a single bin."""
    bins = of_rows(values)
    while len(bins) > 1:
        bins = folded(bins)
        yield bins


def size(rows: int, level: int) -> int:
    """Number of bins at a level."""
    return -(-rows // FACTOR**level)


def depth(rows: int) -> int:
    """Number of levels that `levels` gives."""
    level = 0
    while size(rows, level) > 1:
        level += 1
    return level


def level_for(rows: int, most: int) -> int:
    """The coarsest level that has half of `most` bins for so many rows."""
    level = 0
    while size(rows, level + 1) >= max(1, most // 2):
        level += 1
        if size(rows, level) == 1:
            break
    return level


def cover(start: int, stop: int, rows: int, top: int) -> list[tuple[int, int, int]]:
    """(level, first, stop): bins up to level `top` that hold the rows from `start` to `stop` of `rows`, and no other."""
    left, right, level = [], [], 0
    while level < top and start < stop:
        first = -(-start // FACTOR)
        last = size(rows, level + 1) if stop == size(rows, level) else stop // FACTOR
        if first >= last:
            break
        if start < first * FACTOR:
            left.append((level, start, first * FACTOR))
        if last * FACTOR < stop:
            right.append((level, last * FACTOR, stop))
        start, stop, level = first, last, level + 1
    middle = [(level, start, stop)] if start < stop else []
    return [*left, *middle, *reversed(right)]


def groups(count: np.ndarray, most: int, cuts: Iterable[int] = ()) -> np.ndarray:
    """Where, among bins of so many rows, each of at most `most` even groups begins; and one at each row of `cuts`."""
    begins = np.cumsum(count) - count
    total = int(begins[-1] + count[-1]) if len(count) else 0
    group = begins * most // max(total, 1)
    new = np.flatnonzero(np.diff(group)) + 1
    at = np.searchsorted(begins, np.fromiter(cuts, np.int64))
    return np.unique(np.concatenate([[0], new, at[at < len(count)]])).astype(np.int64) if len(count) else new


def _folded(bins: Bins, size: int) -> Bins:
    """Every `size` bins as one; they divide evenly."""
    low, mean, high, bad = (
        part.reshape(-1, size, *part.shape[1:]) for part in (bins.low, bins.mean, bins.high, bins.nonfinite)
    )
    count = bins.count.reshape(-1, size)
    if not bins.nonfinite.any():
        total = np.einsum("bsw,bs->bw", mean, count.astype(np.float64))
        rows = count.sum(axis=1)
        return Bins(rows, low.min(1), total / rows[:, None], high.max(1), bad[:, 0])
    known = count[:, :, None] - bad
    total = (np.where(known > 0, mean, 0) * known.astype(np.float64)).sum(1)
    lost = bad.sum(1, dtype=np.int32)
    rows = count.sum(axis=1)
    low, high = np.fmin.reduce(low, axis=1), np.fmax.reduce(high, axis=1)
    return Bins(rows, low, _mean(total, rows[:, None] - lost), high, lost)


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
