"""Cells: a run's read × source pictures as rows of a frame, one existing cell each.

Two kinds of picture: what the reads of AttnRes chose (rows are reads, columns the sources of the layout), and what was
recovered from the states of any model (rows the same, columns the embedding and every layer).
"""

import numpy as np
import pandas as pd

from app.frames import finite, nearest, series
from probes import Run

CHOSEN = ("depth_weight", "depth_weight_std", "contribution_rms", "depth_attribution")
RECOVERED = ("mixing_weight", "mixing_share")
PICTURES = ("depth_weight", "contribution_rms", "mixing_weight", "mixing_share", "depth_attribution")
R2 = "mixing_r2"


def family(name: str) -> tuple[str, ...]:
    """The metrics that share cells with this one."""
    return RECOVERED if name in RECOVERED else CHOSEN


def columns(run: Run, name: str) -> list[str]:
    """The label of each column."""
    return run.layout.outputs if name in RECOVERED else [source.label for source in run.sources]


def exists(run: Run, name: str) -> np.ndarray:
    """bool [R, S]: which cells there are."""
    if name not in RECOVERED:
        return run.layout.triangle()
    count = len(run.reads)
    return np.tri(count, count, dtype=bool)


def rows(run: Run, kind: str) -> list[int]:
    """The reads of a kind ("all", "attention", "mlp"), each time with the final read."""
    return [row for row, read in enumerate(run.reads) if kind == "all" or read.kind in (kind, "final")]


def cells(run: Run, step: int, name: str = "depth_weight", kind: str = "all") -> pd.DataFrame:
    """One row per existing cell at the last step up to `step` that recorded `name`.

    step, row (position among the shown reads), number (of the read, from 1), read, source (column), from, kind, sources
    (how many the read has), newest, the metrics that share these cells, and mixing_r2 of the read where it was recovered.
    """
    index = nearest(series(run, name)[0], step)
    measures = family(name)
    fields = ["step", "row", "number", "read", "source", "from", "kind", "sources", "newest", *measures]
    if index is None:
        return pd.DataFrame(columns=fields)
    at = int(series(run, name)[0][index])
    chosen = rows(run, kind)
    there = exists(run, name)[chosen]
    row, column = np.nonzero(there)
    counts = there.sum(axis=1)
    reads = [run.reads[r] for r in chosen]
    frame = {
        "step": at,
        "row": row.astype(np.int16),
        "number": np.array(chosen, np.int16)[row] + 1,
        "read": pd.Categorical.from_codes(row, [read.label for read in reads]),
        "source": column.astype(np.int16),
        "from": pd.Categorical.from_codes(column, columns(run, name)),
        "kind": pd.Categorical([reads[r].kind for r in row]),
        "sources": counts[row].astype(np.int16),
        "newest": column == counts[row] - 1,
    }
    for measure in measures:
        frame[measure] = _exactly(run, measure, at, there.shape, chosen)[there]
    if name in RECOVERED and R2 in run:
        frame[R2] = _exactly(run, R2, at, (len(chosen),), chosen)[row]
    return pd.DataFrame(frame)


def played(run: Run, name: str, stops: list[int], kind: str = "all") -> np.ndarray:
    """float32 [cells, stops]: the picture at each stop, in the order of `cells`, blank before it was first recorded."""
    steps, values = series(run, name)
    index = np.searchsorted(steps, stops, side="right") - 1
    chosen = rows(run, kind)
    found = finite(values[np.maximum(index, 0)][:, chosen])
    found[index < 0] = np.nan
    return found[:, exists(run, name)[chosen]].T


def span(values: np.ndarray, top: float | None = None) -> tuple[float, float]:
    """The colours' domain: from zero to `top`, or as far below zero where values go there.

    Without `top` the largest half of a percent is left to the scale's end, so that the short reads at the top of a deep
    triangle do not flatten the rest. Recovered weights stray a little below zero; only what matters beside the largest is
    drawn as negative.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = (float(value) for value in np.quantile(known, [0.005, 0.995]))
    high = top if top is not None else high
    if low < -0.1 * max(high, 0.0):
        far = max(high, -low)
        return -far, far
    return 0.0, high if high > 0 else 1.0


def _exactly(run: Run, name: str, step: int, shape: tuple[int, ...], chosen: list[int]) -> np.ndarray:
    """float32 rows of a metric at exactly `step`, blank where it was not recorded."""
    steps, values = series(run, name)
    index = nearest(steps, step)
    if index is None or steps[index] != step:
        return np.full(shape, np.nan, np.float32)
    return finite(values[index])[chosen]
