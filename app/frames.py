"""Frames: a run's numbers as the rows a chart draws. What was not recorded gives no rows."""

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd

from app import gaps
from app.derived import DERIVED, metric
from probes import Run
from probes.layout import Layout
from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE

POINTS = 2_000  # a line's points at most
COLUMNS = 200  # a heatmap's columns at most,
CELLS = 16_000  # and its cells
STOPS = 400  # a step slider's stops at most
PLAYED = 1_000_000  # numbers sent along for playback, at most


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [N] and values float32 [N, ...] of one metric, or a derived one; N = 0 where it was not recorded."""
    if name in DERIVED:
        steps, values = series(run, DERIVED[name].source)
        return steps, DERIVED[name].take(values) if len(steps) else values
    if name not in run:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    steps, values = run.steps(name), run[name]
    count = min(len(steps), len(values))  # a refresh may fall between the two reads
    return steps[:count], values[:count]


def nearest(steps: np.ndarray, step: int) -> int | None:
    """Index of the last recorded step that is not after `step`; None when the first comes later."""
    index = int(np.searchsorted(steps, step, side="right")) - 1
    return index if index >= 0 else None


def stops(runs: Iterable[Run], names: Iterable[str]) -> list[int]:
    """Every step at which any of the runs recorded any of the metrics, thinned to at most 400, ends kept."""
    names = list(names)
    found = [series(run, name)[0] for run in runs for name in names]
    steps = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    return thinned([int(step) for step in steps], STOPS)


def thinned(steps: list[int], most: int) -> list[int]:
    """All steps, or at most as many (but two), evenly chosen, ends kept."""
    most = max(2, most)
    if len(steps) <= most:
        return steps
    return [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]


def scalars(runs: Iterable[Run]) -> list[str]:
    """Names of the scalars that any of the runs recorded, losses first."""
    names = {name for run in runs for name in run.metrics if metric(name).axes == ()}
    return sorted(names, key=lambda name: (name != "loss", name != "val_loss", name))


def places(layout: Layout, axes: tuple[str, ...]) -> list[tuple[int, str]]:
    """Position and label of each entry over depth: source 0 is the embedding, states count from 1."""
    if axes == OUTPUT:
        return list(enumerate(layout.outputs))
    if axes == STATE:
        return list(enumerate(layout.states, 1))
    if axes == LAYER:
        return [(layer.index, layer.label) for layer in layout.layers]
    if axes == READ:
        return [(row, read.label) for row, read in enumerate(layout.reads, 1)]
    if axes == BLOCK:
        return [(block, f"transformer block {block}") for block in range(1, layout.blocks + 1)]
    raise ValueError(f"{axes} is not an axis over depth")


def scalar(
    run: Run, label: str, name: str, x: str = "step", window: int = 1, most: int = POINTS
) -> pd.DataFrame:
    """run, step, x, low, value, high, segment: one row per recorded step, or minimum, mean and maximum of `most` bins.

    `x` "tokens" or "wall_time" gives what was logged of it by that step. `window` recorded points are averaged; low
    and high are then the extremes within the window, so that a spike stays in the band. `segment` counts the gaps.
    """
    steps, values = series(run, name)
    values = finite(values).astype(np.float64)
    segment = gaps.segments(run, steps)
    low, high = values, values
    if window > 1 and len(values):
        values, low, high = _smooth(values, window, segment)
    along = steps.astype(np.float64)
    if x != "step":
        known, told = series(run, x)
        along = np.interp(steps, known, told) if len(known) else np.full(len(steps), np.nan)
    if len(steps) > most:
        starts = _bins(len(steps), most, segment)
        low, high = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        counts = np.add.reduceat(np.isfinite(values).astype(np.float64), starts)
        total = np.add.reduceat(np.nan_to_num(values), starts)
        values = np.divide(total, counts, out=np.full_like(total, np.nan), where=counts > 0)
        steps, along, segment = steps[starts], along[starts], segment[starts]
    frame = pd.DataFrame(
        {
            "run": label,
            "step": steps,
            "x": along,
            "low": low,
            "value": values,
            "high": high,
            "segment": segment,
        }
    )
    return frame if x == "step" else frame.dropna(subset=["x"])


def smoothing(runs: Iterable[Run], name: str) -> int:
    """A window for all runs of a chart: a fiftieth of the points of the longest."""
    return max((len(series(run, name)[0]) for run in runs), default=0) // 50


def _bins(count: int, most: int, segment: np.ndarray) -> np.ndarray:
    """Where each of about `most` equal bins begins; none reaches across a gap."""
    even = np.linspace(0, count, most, endpoint=False).astype(int)
    return np.union1d(even, np.flatnonzero(np.diff(segment)) + 1)


def _smooth(
    values: np.ndarray, window: int, segment: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of the last `window` values at each point, blanks left out; begins anew after a gap."""
    rolling = pd.Series(values).groupby(segment).rolling(window, min_periods=1)
    return rolling.mean().to_numpy(), rolling.min().to_numpy(), rolling.max().to_numpy()


def profile(run: Run, label: str, name: str, step: int) -> pd.DataFrame:
    """run, step, depth, place, value: one metric over depth at the nearest recorded step not after `step`."""
    steps, values = series(run, name)
    index = nearest(steps, step)
    if index is None:
        return pd.DataFrame(columns=["run", "step", "depth", "place", "value"])
    depths, labels = zip(*places(run.layout, metric(name).axes), strict=True)
    return pd.DataFrame(
        {
            "run": label,
            "step": steps[index],
            "depth": depths,
            "place": labels,
            "value": finite(values[index]),
        }
    )


def of_source(run: Run, label: str, name: str, position: int) -> pd.DataFrame:
    """run, step, value, segment: one entry of a metric over depth, at every recorded step."""
    steps, values = series(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["run", "step", "value", "segment"])
    segment = gaps.segments(run, steps)
    return pd.DataFrame(
        {"run": label, "step": steps, "value": finite(values[:, position]), "segment": segment}
    )


def played(stops: list[int], rows: int) -> list[int]:
    """The stops a playback of so many rows shows: all, or as many as can be sent along, ends kept."""
    return thinned(stops, PLAYED // max(rows, 1))


def profile_frames(run: Run, name: str, stops: list[int]) -> np.ndarray:
    """float32 [depths, stops]: one metric over depth at each stop, blank before it was first recorded."""
    return _at_stops(run, name, stops).T


def _at_stops(run: Run, name: str, stops: list[int]) -> np.ndarray:
    steps, values = series(run, name)
    index = np.searchsorted(steps, stops, side="right") - 1
    found = finite(values[np.maximum(index, 0)])
    found[index < 0] = np.nan
    return found


def over_training(run: Run, name: str) -> pd.DataFrame:
    """step, until, depth, value, place: a layer × step grid, columns averaged down to at most 200."""
    steps, values = series(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["step", "until", "depth", "value", "place"])
    columns = min(len(steps), COLUMNS, max(1, CELLS // values.shape[1]))
    segment = gaps.segments(run, steps)
    starts = _bins(len(steps), columns, segment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a bin of blanks stays blank
        groups = np.split(finite(values), starts[1:])
        grid = np.stack([np.nanmean(group, axis=0) for group in groups])
    first = steps[starts]
    spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else max(1, run.manifest.every)
    until = np.append(first[1:], steps[-1] + spacing)
    before_gap = np.flatnonzero(np.diff(segment[starts]))
    until[before_gap] = steps[starts[before_gap + 1] - 1] + spacing
    depths, labels = zip(*places(run.layout, metric(name).axes), strict=True)
    return pd.DataFrame(
        {
            "step": np.repeat(first.astype(np.int32), len(depths)),
            "until": np.repeat(until.astype(np.int32), len(depths)),
            "depth": np.tile(np.array(depths, np.int16), len(first)),
            "value": grid.ravel().astype(np.float32),
            "place": pd.Categorical.from_codes(np.tile(np.arange(len(depths)), len(first)), list(labels)),
        }
    )


def evenness(run: Run, label: str, name: str) -> pd.DataFrame:
    """run, step, cv, ratio, gini over depth, embedding left out, per recorded step; segment counts the gaps."""
    steps, values = series(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["run", "step", "cv", "ratio", "gini", "segment"])
    values = finite(values.astype(np.float64))
    if metric(name).axes == OUTPUT:
        values = values[:, 1:]
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        cv = np.nanstd(values, axis=1) / np.nanmean(values, axis=1)
        ratio = np.nanmax(values, axis=1) / np.nanmin(values, axis=1)
    told = {"cv": finite(cv), "ratio": finite(ratio), "gini": gini(values)}
    frame = pd.DataFrame({"run": label, "step": steps, **told, "segment": gaps.segments(run, steps)})
    if len(frame) > POINTS:
        frame = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, POINTS).astype(int))]
    return frame.reset_index(drop=True)


def gini(values: np.ndarray) -> np.ndarray:
    """Gini coefficient of each row [N, L]: 0 when all are equal, near 1 when one has everything; blank with a blank."""
    ordered = np.sort(values, axis=1)
    count = values.shape[1]
    rank = 2 * np.arange(1, count + 1) - count - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return finite((ordered * rank).sum(axis=1) / (count * ordered.sum(axis=1)))


def update_ratio(run: Run, label: str, step: int) -> pd.DataFrame:
    """run, step, depth, place, value: the update ratio as recorded, layer by layer; of a run without it param_grad_norm
    times lr over param_norm, and none without all three."""
    if "update_ratio" in run:
        return profile(run, label, "update_ratio", step)
    parts = [profile(run, label, name, step) for name in ("param_grad_norm", "param_norm")]
    steps, rates = series(run, "lr")
    index = nearest(steps, step)
    if index is None or any(part.empty for part in parts):
        return parts[0].iloc[:0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = parts[0]["value"] * float(rates[index]) / parts[1]["value"]
    return parts[0].assign(value=finite(ratio.to_numpy()))


def finite(values: np.ndarray) -> np.ndarray:
    """Infinities become blanks: a chart has no place for them."""
    return np.where(np.isfinite(values), values, np.nan)
