"""Rows: a metric's values as an array that is read as far as somebody asks, and the bins that a chart has room for."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from app import gaps
from app.derived import DERIVED
from probes import Run
from probes.series import Binned, Series

SMALL = 16 << 20  # bytes up to which a metric is read as a whole
COURSE = 1_000  # points of an entry of a matrix over training
FINE = 500  # bins looked through for one row
STANDS_OUT = 3.0  # a value so many times the mean around it is looked at
LOOKED_AT = 16  # spikes looked for, at most


class Rows:
    """Values [N, ...] of a metric; `rows[i]`, `rows[[i, j]]` and `rows[i:j, column]` read those rows and no others."""

    def __init__(self, series: Series, take: Callable[[np.ndarray], np.ndarray]):
        self._series, self._take = series, take
        self.shape = (len(series), *take(series.at([])).shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        which, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(which, slice) or np.ndim(which) or np.asarray(which).dtype == bool:
            found = self._take(self._series.at(np.arange(len(self))[which]))
            return found[(slice(None), *rest)]
        found = self._take(self._series.at([range(len(self))[int(which)]]))[0]
        return found[tuple(rest)] if rest else found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray | Rows]:
    """Steps int64 [N] and values float32 [N, ...] of one metric, or a derived one, large ones as `Rows`; N = 0 where it was
    not recorded."""
    recorded, take = name, _as_it_is
    if name in DERIVED:
        recorded, take = DERIVED[name].source, DERIVED[name].take
    if recorded not in run:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    found = run.series(recorded)
    if found.nbytes <= SMALL or found.width == 1:
        return found.steps, take(run[recorded])
    return found.steps, Rows(found, take)


def steps(run: Run, name: str) -> np.ndarray:
    """int64 [N]: the steps at which a metric, or what it is derived from, was recorded."""
    recorded = DERIVED[name].source if name in DERIVED else name
    return run.steps(recorded) if recorded in run else np.empty(0, np.int64)


def binned(
    run: Run,
    name: str,
    most: int,
    positions: Sequence[int] | None = None,
    window: tuple[int, int] | None = None,
) -> Binned:
    """At most `most` bins [b, k], and one more for each gap, of the entries `positions` over depth (all without) of a metric
    that was recorded; the steps of `window` only. No bin reaches across a gap."""
    recorded, columns = name, positions
    if name in DERIVED:
        recorded = DERIVED[name].source
        cells = np.arange(run.series(recorded).width, dtype=np.float32)[None]
        columns = DERIVED[name].take(run.series(recorded).shaped(cells))[0]
        columns = columns if positions is None else columns[list(positions)]
    elif positions is None:
        columns = range(run.series(name).width)
    found = run.series(recorded)
    first, last = window or (None, None)
    return found.bins(most, first, last, np.asarray(columns, np.int64), gaps.cuts(run, found.steps))


def segments(run: Run, name: str, index: np.ndarray) -> np.ndarray:
    """int32: how many gaps lie before each of these rows of a metric."""
    return np.searchsorted(gaps.cuts(run, steps(run, name)), index, side="right").astype(np.int32)


def even(count: int, most: int) -> np.ndarray:
    """At most `most` row numbers up to `count`, evenly apart, ends kept."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
        if count
        else np.arange(0)
    )


def telling(run: Run, name: str, most: int) -> np.ndarray:
    """Numbers of the rows to look at where all would be too many: even ones, and those that stand out from the rows around
    them by a value many times as large."""
    found = run.series(DERIVED[name].source if name in DERIVED else name)
    if len(found) <= most:
        return np.arange(len(found))
    bins = found.bins(most // 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.nan_to_num(bins.high / bins.mean, posinf=0).reshape(len(bins), -1)
    far = beyond.max(axis=1)
    best = [at for at in np.argsort(far)[::-1][:LOOKED_AT] if far[at] > STANDS_OUT]
    spikes = [
        _highest(found, int(bins.start[at]), int(bins.count[at]), int(np.argmax(beyond[at]))) for at in best
    ]
    return np.union1d(even(len(found), most), np.array(spikes, np.int64))


def looked_at(runs: Iterable[Run], name: str, most: int, standing_out: bool = True) -> str:
    """ "Computed at 2,000 of 1,000,000 recorded steps, and at those that stand out." Empty where all are."""
    longest = max((len(steps(run, name)) for run in runs), default=0)
    more = ", and at those that stand out" if standing_out else ""
    return f"Computed at {most:,} of {longest:,} recorded steps{more}." if longest > most else ""


def course(
    run: Run, name: str, entries: Sequence[tuple[int, ...]], until: int
) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n, k] of some entries of a metric's rows 0 to `until`: all of a short run, else means of bins
    between the first and the last."""
    known, values = series(run, name)
    if not isinstance(values, Rows):
        return known[: until + 1], np.stack([values[(slice(until + 1), *entry)] for entry in entries], axis=1)
    found = run.series(name)
    cells = found.shaped(np.arange(found.width, dtype=np.float32)[None])[0]
    columns = np.array([cells[entry] for entry in entries], np.int64)
    bins = found.between(0, until + 1, COURSE, columns)
    ends = np.stack([values[[0, until]][(slice(None), *entry)] for entry in entries], axis=1)
    inner = slice(1, -1) if len(bins) > 2 else slice(0)
    return (
        np.concatenate([known[[0]], bins.first[inner], known[[until]]]),
        np.concatenate([ends[:1], bins.mean[inner], ends[1:]]),
    )


def _highest(found: Series, start: int, count: int, position: int) -> int:
    """The number of the row, of `count` from `start` on, that has the greatest value at a position of the unpacked row."""
    while count > 1:
        bins = found.between(start, start + count, FINE)
        high = bins.high.reshape(len(bins), -1)[:, position]
        at = int(np.nanargmax(high))
        start, count = int(bins.start[at]), int(bins.count[at])
    return start


def _as_it_is(values: np.ndarray) -> np.ndarray:
    return values
