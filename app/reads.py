"""Reads as a whole: how local they are over training, and which sources everybody or nobody reads."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import words
from app.frames import nearest, series
from probes import Run

MEASURES = {
    "newest": "Weight on the newest source",
    "embedding": "Weight on the embedding",
    "distance": "Mean distance of what is read",
    "entropy": "Depth entropy",
}
UNITS = {
    "newest": "share",
    "embedding": "share",
    "distance": "sources back",
    "entropy": "1 is an even average",
}
MEANING = (
    "*Weight on the newest source* and *on the embedding* and *distance* are means over the reads of three sources "
    "or more; a distance of 0 is the newest source. An *even share* is one divided by the number of sources. A *sink* "
    "gets at least one and a half even shares from three quarters of its readers; *ballast* gets less than half an "
    "even share from every reader. Both need three readers for whom the source is not the newest."
)
READERS, SINK, MOST, BALLAST = 3, 1.5, 0.75, 0.5


def over_training(run: Run, label: str, kind: str = "all") -> pd.DataFrame:
    """run, step, newest, embedding, distance, entropy: one row a recorded matrix; `kind` keeps those reads."""
    steps, values = series(run, "depth_weight")
    rows = [r for r, read in enumerate(run.reads) if read.sources > 2 and _of(kind, read.kind)]
    if not len(steps) or not rows:
        return pd.DataFrame(columns=["run", "step", *MEASURES])
    weight = np.nan_to_num(values[:, rows].astype(np.float64))
    count = np.array([run.reads[r].sources for r in rows])
    back = np.maximum(count[:, None] - 1 - np.arange(weight.shape[2])[None, :], 0)
    told = {
        "newest": np.take_along_axis(weight, (count - 1)[None, :, None], axis=2).mean(axis=(1, 2)),
        "embedding": weight[:, :, 0].mean(axis=1),
        "distance": (weight * back).sum(axis=2).mean(axis=1),
        "entropy": _entropy(run, steps, rows),
    }
    return pd.DataFrame({"run": label, "step": steps, **told})


@dataclass(frozen=True)
class Roles:
    """Labels of the sources that everybody reads and of those that nobody reads."""

    sinks: list[str]
    ballast: list[str]

    def sentence(self) -> str:
        """ "Everybody reads the embedding (sink); nobody reads layer 5 (attention) (ballast)."."""
        parts = []
        for verb, labels in (
            ("Sinks, which most reads lean on", self.sinks),
            ("Ballast, which no read leans on", self.ballast),
        ):
            more = len(labels) - 6
            shown = [*labels[:6], f"{more} more"] if more > 0 else labels
            parts.append(f"{verb}: {words.joined(shown) if labels else 'none'}.")
        return " ".join(parts)


def roles(run: Run, step: int, kind: str = "all") -> Roles | None:
    """Sinks and ballast at the last recorded matrix up to `step`; None before the first."""
    steps, values = series(run, "depth_weight")
    index = nearest(steps, step)
    if index is None:
        return None
    sinks, ballast = [], []
    for column, source in enumerate(run.sources):
        shares = np.array(
            [
                values[index, r, column] * read.sources
                for r, read in enumerate(run.reads)
                if read.sources > 2 and column < read.sources - 1 and _of(kind, read.kind)
            ]
        )
        shares = shares[np.isfinite(shares)]
        if len(shares) < READERS:
            continue
        if (shares >= SINK).mean() >= MOST:
            sinks.append(source.label)
        elif shares.max() < BALLAST:
            ballast.append(source.label)
    return Roles(sinks, ballast)


def finding(frame: pd.DataFrame, name: str) -> str:
    """The last value of a measure, run by run."""
    told = []
    for run, part in frame.dropna(subset=[name]).groupby("run", sort=False):
        value = float(part[name].iloc[-1])
        told.append(f"{words.percent(value) if name in ('newest', 'embedding') else f'{value:.2f}'} in {run}")
    return f"{MEASURES[name]}: {words.joined(told) if told else 'not recorded'}"


def _entropy(run: Run, steps: np.ndarray, rows: list[int]) -> np.ndarray:
    """Mean depth entropy of the rows at exactly these steps, blank where it was not recorded."""
    known, values = series(run, "depth_entropy")
    found = np.full(len(steps), np.nan)
    if len(known):
        at = np.minimum(np.searchsorted(known, steps), len(known) - 1)
        same = known[at] == steps
        found[same] = values[at[same]][:, rows].mean(axis=1)
    return found


def _of(kind: str, own: str) -> bool:
    return kind == "all" or own in (kind, "final")
