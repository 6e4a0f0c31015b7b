"""Fits: how a metric grows with depth, as the slope of a straight line on two logarithmic axes."""

import numpy as np
import pandas as pd

from app import reading, words
from app.frames import POINTS
from app.reading import series
from probes import Run
from probes.vocabulary import OUTPUT, metric

MEANING = (
    "The *growth exponent* is the slope of a least-squares line through the logarithms of value and depth, layer 1 to "
    "the last: 0 is level, 0.5 grows like the square root of depth, 1 in proportion to it. R² tells how straight the "
    "points lie; a low one means that no single exponent describes them."
)
STRAIGHT = 0.5  # of R²: below it more of the variation is off the line than on it


def slopes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, intercept and R² of log(value) over log(depth 1..L) for each row [N, L]; blank for fewer than three points."""
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(np.where(values > 0, values, np.nan).astype(np.float64))
    x = np.where(np.isfinite(y), np.log(np.arange(1, values.shape[1] + 1))[None, :], np.nan)
    y = np.where(np.isfinite(y), y, np.nan)
    count = np.isfinite(y).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = np.nansum(x, axis=1) / count, np.nansum(y, axis=1) / count
        dx, dy = x - mean_x[:, None], y - mean_y[:, None]
        slope = np.nansum(dx * dy, axis=1) / np.nansum(dx * dx, axis=1)
        spread = np.nansum(dy * dy, axis=1)
        left = np.nansum((dy - slope[:, None] * dx) ** 2, axis=1)
        r2 = np.where(spread > 1e-12, 1 - left / spread, np.nan)
    enough = count >= 3
    return tuple(np.where(enough, part, np.nan) for part in (slope, mean_y - slope * mean_x, r2))


def fitted(frame: pd.DataFrame) -> pd.DataFrame:
    """run, exponent, r2, and the line's two ends (depth, value each), for every run of a profile from layer 1."""
    rows = []
    for run, part in frame[frame["depth"] >= 1].groupby("run", sort=False):
        slope, intercept, r2 = (float(told[0]) for told in slopes(part["value"].to_numpy()[None, :]))
        if not np.isfinite(slope):
            continue
        for depth in (1, int(part["depth"].max())):
            rows.append((run, slope, r2, depth, float(np.exp(intercept + slope * np.log(depth)))))
    return pd.DataFrame(rows, columns=["run", "exponent", "r2", "depth", "value"])


def over_training(run: Run, label: str, name: str) -> pd.DataFrame:
    """run, step, exponent, r2, segment at every recorded step, or at the telling ones of very many."""
    steps, values = series(run, name)
    if not len(steps):
        return pd.DataFrame(columns=["run", "step", "exponent", "r2", "segment"])
    keep = reading.telling(run, name, POINTS)
    values = values[keep][:, 1:] if metric(name).axes == OUTPUT else values[keep]
    slope, _, r2 = slopes(values)
    segment = reading.segments(run, name, keep)
    return pd.DataFrame({"run": label, "step": steps[keep], "exponent": slope, "r2": r2, "segment": segment})


def finding(lines: pd.DataFrame, name: str) -> str:
    """ "Hidden-state RMS goes like depth^0.48 in prenorm (R² 0.91); no power of depth fits full (R² 0.08)"."""
    each = lines.drop_duplicates("run")
    bad = each["r2"] < STRAIGHT
    good = [
        f"depth^{row.exponent:.2f} in {row.run} ({'level' if np.isnan(row.r2) else f'R² {row.r2:.2f}'})"
        for row in each[~bad].itertuples()
    ]
    none = [f"{row.run} (R² {row.r2:.2f})" for row in each[bad].itertuples()]
    parts = [f"goes like {words.joined(good)}"] if good else []
    parts += [f"no power of depth fits {words.joined(none)}"] if none else []
    title = metric(name).title
    if not parts:
        return f"{title}: too few layers for a fit"
    return f"{title} {'; '.join(parts)}" if good else f"{title}: {parts[0]}"
