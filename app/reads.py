"""Reads as a whole: how local they are over training, and which sources everybody or nobody reads."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import cells, reading, words
from app.frames import nearest
from app.reading import series
from probes import Run

MEASURES = {
    "newest": "Weight on the newest source",
    "embedding": "Weight on the embedding",
    "distance": "Mean distance of what is read",
    "entropy": "Depth entropy",
}
SHARED = MEASURES | {
    "newest": "Share of the newest source",
    "embedding": "Share of the embedding",
    "distance": "Mean distance of what a state is made of",
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
SHARES = ("depth_weight", "mixing_share")  # each read's values sum to one: even shares have a meaning
MATRICES = 250  # looked at over training, at most
READERS, SINK, MOST, BALLAST = 3, 1.5, 0.75, 0.5


def over_training(
    run: Run, label: str, kind: str = "all", name: str = "depth_weight", index: np.ndarray | None = None
) -> pd.DataFrame:
    """run, step, newest, embedding, embedding_even (in even shares), distance, entropy, segment: one row a recorded matrix,
    of very many for even ones, or for those of the numbers `index`.

    `kind` keeps those reads. What was not measured (blank cells) is left out of the mean; a distance needs a whole row.
    """
    steps, values = series(run, name)
    counts = cells.exists(run, name).sum(axis=1)
    chosen = [row for row in cells.rows(run, kind) if counts[row] > 2]
    index = reading.even(len(steps), MATRICES) if index is None else index
    if not len(index) or not chosen:
        return pd.DataFrame(columns=["run", "step", "embedding_even", *MEASURES, "segment"])
    # Some at a time: of a deep model a thousand matrices take a hundred megabytes.
    parts = [
        _told(values[some][:, chosen], counts[chosen])
        for some in np.array_split(index, -(-len(index) // 100))
    ]
    told = {measure: np.concatenate([part[measure] for part in parts]) for measure in parts[0]}
    steps = steps[index]
    told |= {"entropy": _entropy(run, steps, chosen), "segment": reading.segments(run, name, index)}
    return pd.DataFrame({"run": label, "step": steps, **told})


def _told(weight: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of some matrices [n, reads, S]; the reads have so many sources."""
    weight = weight.astype(np.float64)
    real = np.arange(weight.shape[2])[None, :] < count[:, None]
    whole = np.isfinite(np.where(real, weight, 0)).all(axis=2)
    back = np.maximum(count[:, None] - 1 - np.arange(weight.shape[2])[None, :], 0)
    told = {
        "newest": np.take_along_axis(weight, (count - 1)[None, :, None], axis=2)[:, :, 0],
        "embedding": weight[:, :, 0],
        "embedding_even": weight[:, :, 0] * count,
        "distance": np.where(
            whole, (np.where(real & np.isfinite(weight), weight, 0) * back).sum(axis=2), np.nan
        ),
    }
    return {measure: _mean(part) for measure, part in told.items()}


@dataclass(frozen=True)
class Roles:
    """Labels of the sources that everybody reads and of those that nobody reads."""

    sinks: list[str]
    ballast: list[str]

    def sentence(self) -> str:
        """ "Sinks, which most reads lean on: embedding. Ballast, which no read leans on: layer 5 (attention)."."""
        parts = []
        for verb, labels in (
            ("Sinks, which most reads lean on", self.sinks),
            ("Ballast, which no read leans on", self.ballast),
        ):
            more = len(labels) - 6
            shown = [*labels[:6], f"{more} more"] if more > 0 else labels
            parts.append(f"{verb}: {words.joined(shown) if labels else 'none'}.")
        return " ".join(parts)


def readership(run: Run, step: int, kind: str = "all", name: str = "depth_weight") -> pd.DataFrame:
    """source, from, readers, least, mean, most, role: what each source gets from its readers, in even shares.

    Readers are the reads of three sources or more for whom it is not the newest; `role` is "sink", "ballast", "read",
    or "few readers", of whom nothing can be said. Empty before the first recorded matrix.
    """
    steps, values = series(run, name)
    index = nearest(steps, step)
    fields = ["source", "from", "readers", "least", "mean", "most", "role"]
    if index is None:
        return pd.DataFrame(columns=fields)
    weight, counts = values[index], cells.exists(run, name).sum(axis=1)
    able = np.array([row for row in cells.rows(run, kind) if counts[row] > 2], int)
    found = []
    for column, label in enumerate(cells.columns(run, name)):
        readers = able[column < counts[able] - 1]
        shares = weight[readers, column] * counts[readers]
        shares = shares[np.isfinite(shares)]
        if not len(shares):
            continue
        role = "read"
        if len(shares) < READERS:
            role = "few readers"
        elif (shares >= SINK).mean() >= MOST:
            role = "sink"
        elif shares.max() < BALLAST:
            role = "ballast"
        found.append((column, label, len(shares), shares.min(), shares.mean(), shares.max(), role))
    return pd.DataFrame(found, columns=fields)


def roles(run: Run, step: int, kind: str = "all", name: str = "depth_weight") -> Roles | None:
    """Sinks and ballast at the last recorded matrix up to `step`; None before the first."""
    if nearest(series(run, name)[0], step) is None:
        return None
    return named(readership(run, step, kind, name))


def named(frame: pd.DataFrame) -> Roles:
    """The sinks and the ballast of a readership."""
    return Roles(*(frame.loc[frame["role"] == role, "from"].tolist() for role in ("sink", "ballast")))


def faded(frame: pd.DataFrame) -> int | None:
    """The step from which on one run's embedding gets less than half an even share; None while it gets more."""
    known = frame.dropna(subset=["embedding_even"])
    kept = np.flatnonzero(known["embedding_even"].to_numpy() >= BALLAST)
    after = int(kept[-1]) + 1 if len(kept) else 0
    return int(known["step"].iloc[after]) if after < len(known) else None


def finding(frame: pd.DataFrame, name: str, titles: dict[str, str] = MEASURES) -> str:
    """The last value of a measure, run by run; of the embedding also whether it still matters."""
    told = []
    for run, part in frame.dropna(subset=[name]).groupby("run", sort=False):
        value = float(part[name].iloc[-1])
        written = words.percent(value) if name in ("newest", "embedding") else f"{value:.2f}"
        told.append(f"{written} in {run}{_mattering(part) if name == 'embedding' else ''}")
    return f"{titles[name]}: {words.joined(told) if told else 'not recorded'}"


def _mattering(part: pd.DataFrame) -> str:
    since = faded(part)
    if since is not None:
        return f" (less than half an even share since step {words.step(since)})"
    return f" ({part['embedding_even'].iloc[-1]:.1f} even shares)"


def _mean(part: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not blank; blank where all is."""
    known = np.isfinite(part).sum(axis=1)
    return np.nansum(part, axis=1) / np.where(known, known, np.nan)


def _entropy(run: Run, steps: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Mean depth entropy of the chosen reads at exactly these steps, blank where it was not recorded."""
    known, values = series(run, "depth_entropy")
    found = np.full(len(steps), np.nan)
    if len(known):
        at = np.minimum(np.searchsorted(known, steps), len(known) - 1)
        same = known[at] == steps
        found[same] = values[at[same]][:, chosen].mean(axis=1, dtype=np.float64)
    return found
