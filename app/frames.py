"""Frames: a run's numbers as the rows a chart draws. What was not recorded gives no rows."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from app import gaps, reading
from app.derived import metric
from app.reading import series
from probes import Run
from probes.layout import Layout
from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE

POINTS = 2_000  # a line's points at most
COLUMNS = 200  # a heatmap's columns at most,
CELLS = 16_000  # and its cells
SPIKE = 10.0  # a step so many times the mean of a cell's steps is shown in its place
STOPS = 400  # a step slider's stops at most
PLAYED = 1_000_000  # numbers sent along for playback, at most


def nearest(steps: np.ndarray, step: int) -> int | None:
    """Index of the last recorded step that is not after `step`; None when the first comes later."""
    index = int(np.searchsorted(steps, step, side="right")) - 1
    return index if index >= 0 else None


def stops(runs: Iterable[Run], names: Iterable[str]) -> list[int]:
    """Every step at which any of the runs recorded any of the metrics, thinned to at most 400, ends kept."""
    names = list(names)
    recorded = [reading.steps(run, name) for run in runs for name in names]
    return thinned(gaps.together(recorded), STOPS)


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """All steps, or at most as many (but two), evenly chosen, ends kept."""
    return [int(steps[i]) for i in reading.even(len(steps), max(2, most))]


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
    run: Run,
    label: str,
    name: str,
    x: str = "step",
    window: int = 1,
    most: int = POINTS,
    zoom: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """run, step, x, low, value, high, nonfinite, segment: one row per recorded step, or minimum, mean and maximum of about
    `most` bins, and of as many more within the steps of `zoom`; `nonfinite` counts what a bin leaves out.

    `x` "tokens" or "wall_time" gives what was logged of it by that step. `window` recorded points are averaged (as many
    bins as hold them); low and high are then the extremes within the window, so that a spike stays in the band. `segment`
    counts the gaps.
    """
    fields = ["run", "step", "x", "low", "value", "high", "nonfinite", "segment"]
    if not len(reading.steps(run, name)):
        return pd.DataFrame(columns=fields)
    frame = _binned(run, name, 0, window, most)
    if zoom is not None and len(reading.steps(run, name)) > most:
        fine = _binned(run, name, 0, window, most, zoom)
        if len(fine):
            outside = (frame["step"] < fine["step"].iloc[0]) | (frame["step"] > fine["until"].iloc[-1])
            frame = pd.concat([frame[outside], fine]).sort_values("step", kind="stable", ignore_index=True)
    frame = frame.assign(run=label, x=frame["step"].astype(np.float64))
    if x != "step":
        known, told = series(run, x)
        frame["x"] = np.interp(frame["step"], known, told) if len(known) else np.nan
        frame = frame.dropna(subset=["x"])
    return frame[fields]


def _binned(
    run: Run,
    name: str,
    position: int,
    window: int = 1,
    most: int = POINTS,
    zoom: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """step, until, low, value, high, nonfinite, segment of one entry of a metric that was recorded."""
    bins = reading.binned(run, name, most, [position], zoom)
    low, value, high = (part[:, 0].astype(np.float64) for part in (bins.low, bins.mean, bins.high))
    segment = reading.segments(run, name, bins.start)
    window = round(window * len(bins) / max(1, int(bins.count.sum())))
    if window > 1:
        value, low, high = _smooth(value, low, high, window, segment)
    return pd.DataFrame(
        {
            "step": bins.first,
            "until": bins.last,
            "low": low,
            "value": value,
            "high": high,
            "nonfinite": bins.nonfinite[:, 0],
            "segment": segment,
        }
    )


def smoothing(runs: Iterable[Run], name: str) -> int:
    """A window for all runs of a chart: a fiftieth of the points of the longest."""
    return max((len(reading.steps(run, name)) for run in runs), default=0) // 50


def _smooth(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, window: int, segment: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of the last `window` values at each point, blanks left out; begins anew after a gap."""

    def rolling(values: np.ndarray):
        return pd.Series(values).groupby(segment).rolling(window, min_periods=1)

    return rolling(value).mean().to_numpy(), rolling(low).min().to_numpy(), rolling(high).max().to_numpy()


def latest(runs: Mapping[str, Run], name: str, x: str = "step", most: int = 50) -> pd.DataFrame:
    """run, step, value: the last finite values of each run up to the last step that all have, and its own last one."""
    parts = {}
    for label, run in runs.items():
        steps, values = series(run, name)
        known = np.isfinite(values)
        if x != "step" and not len(reading.steps(run, x)):
            known[:] = False
        if known.any():
            parts[label] = steps[known], values[known]
    common = min((int(steps[-1]) for steps, _ in parts.values()), default=0)
    found = [pd.DataFrame({"run": [], "step": [], "value": []})]
    for label, (steps, values) in parts.items():
        stop = int(np.searchsorted(steps, common, side="right"))
        index = np.union1d(np.arange(max(0, stop - most), stop), [len(steps) - 1])
        found.append(
            pd.DataFrame({"run": label, "step": steps[index], "value": values[index].astype(np.float64)})
        )
    return pd.concat(found[1:] or found, ignore_index=True)


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


def last_finite(run: Run, name: str, step: int) -> int | None:
    """The last step up to `step` at which all values of a metric over depth were finite; None if none."""
    steps, values = series(run, name)
    stop = int(np.searchsorted(steps, step, side="right"))
    while stop > 0:
        start = max(0, stop - 1000)
        alive = np.flatnonzero(np.isfinite(values[start:stop]).all(axis=1))
        if len(alive):
            return int(steps[start + alive[-1]])
        stop = start
    return None


def of_source(run: Run, label: str, name: str, position: int) -> pd.DataFrame:
    """run, step, low, value, high, segment: one entry of a metric over depth, at every recorded step or in bins."""
    fields = ["run", "step", "low", "value", "high", "segment"]
    if not len(reading.steps(run, name)):
        return pd.DataFrame(columns=fields)
    return _binned(run, name, position).assign(run=label)[fields]


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
    """step, until, depth, value, place: a layer × step grid of at most 200 columns.

    A cell is the mean of its steps, or the greatest of them where that is ten times as much: a spike of one step is seen.
    """
    steps = reading.steps(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["step", "until", "depth", "value", "place"])
    bins = reading.binned(
        run, name, min(COLUMNS, max(1, CELLS // len(places(run.layout, metric(name).axes))))
    )
    spike = (bins.low >= 0) & (bins.high / SPIKE > bins.mean)  # round zero a mean says nothing
    grid = np.where(spike, bins.high, bins.mean)
    first, segment = bins.first, reading.segments(run, name, bins.start)
    spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else max(1, run.manifest.every)
    until = np.append(first[1:], steps[-1] + spacing)
    before_gap = np.flatnonzero(np.diff(segment))
    until[before_gap] = bins.last[before_gap] + spacing
    depths, labels = zip(*places(run.layout, metric(name).axes), strict=True)
    # A browser reads no integers of 64 bits as numbers.
    kind = np.int32 if until[-1] < 1 << 31 else np.float64
    return pd.DataFrame(
        {
            "step": np.repeat(first.astype(kind), len(depths)),
            "until": np.repeat(until.astype(kind), len(depths)),
            "depth": np.tile(np.array(depths, np.int16), len(first)),
            "value": grid.ravel().astype(np.float32),
            "place": pd.Categorical.from_codes(np.tile(np.arange(len(depths)), len(first)), list(labels)),
        }
    )


def evenness(run: Run, label: str, name: str) -> pd.DataFrame:
    """run, step, cv, ratio, gini over depth, embedding left out, at each recorded step or at the telling ones of very many
    (`reading.telling`); segment counts the gaps."""
    steps, values = series(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["run", "step", "cv", "ratio", "gini", "segment"])
    index = reading.telling(run, name, POINTS)
    values = finite(values[index].astype(np.float64))
    if metric(name).axes == OUTPUT:
        values = values[:, 1:]
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        cv = np.nanstd(values, axis=1) / np.nanmean(values, axis=1)
        ratio = np.nanmax(values, axis=1) / np.nanmin(values, axis=1)
    told = {"cv": finite(cv), "ratio": finite(ratio), "gini": gini(values)}
    segment = reading.segments(run, name, index)
    return pd.DataFrame({"run": label, "step": steps[index], **told, "segment": segment})


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
