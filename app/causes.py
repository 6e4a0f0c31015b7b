"""Causes: what attribution found as rows of frames. Needs no torch.

A value is the target without an edge or a layer minus the target with it: of a loss, above zero means needed.
"""

import numpy as np
import pandas as pd

from app import cells, words
from app.frames import nearest, series
from probes import Run
from probes.attributed import (
    EFFECT,
    METHODS,
    RANDOM,
    SHARE,
    WEIGHT,
    Attribution,
    Curve,
)

LIVE = "depth_attribution"
NAMED = 3  # disagreements named on each side
_QUESTION = ("target", "mass", "data", "sequences", "tokens")
RANKED = {
    WEIGHT: "by weight",
    SHARE: "by share",
    EFFECT: "by attribution",
    RANDOM: "at random",
}


def edge_methods(found: Attribution) -> list[str]:
    return [method for method in METHODS if method in found.edges]


def layer_methods(found: Attribution) -> list[str]:
    return [method for method in METHODS if method in found.layers]


def edges(found: Attribution, method: str) -> pd.DataFrame:
    """One row an edge: number (of the read, from 1), read, source (column), from, sources (of the read), even (weight in
    even shares), weight, share, value, needed, spread (standard deviation over sequences), error (of the mean, blank of one
    sequence), tokens (standard deviation over tokens, blank where not known)."""
    blank = np.full(found.layout.triangle().shape, np.nan)
    spread = found.edges_std.get(method, blank)
    return _edges(
        found.layout,
        {
            "weight": found.weight if found.weight is not None else blank,
            "share": found.share if found.share is not None else blank,
            "value": found.edges.get(method, blank),
            "needed": _needed(found, found.edges.get(method, blank)),
            "spread": spread,
            "error": _error(found, spread),
            "tokens": found.edges_token_std.get(method, blank),
        },
    )


def live(run: Run, step: int) -> pd.DataFrame:
    """The same of the attribution that was recorded while training, at the last step up to `step`; empty without."""
    steps, _ = series(run, LIVE)
    index = nearest(steps, step)
    if index is None:
        return pd.DataFrame(
            columns=["number", "read", "source", "from", "sources", "even", "weight", "value", "needed"]
        )
    found = cells.cells(run, int(steps[index]), LIVE)
    blank = np.full(run.layout.triangle().shape, np.nan)
    weight, value = blank.copy(), blank.copy()
    at = found["number"].to_numpy() - 1, found["source"].to_numpy()
    weight[at], value[at] = found["depth_weight"], found[LIVE]
    if "depth_weight" not in run:
        weight = blank
    return _edges(
        run.layout,
        {name: blank for name in ("share", "spread", "error", "tokens")}
        | {"weight": weight, "value": value, "needed": value},
    )


def _needed(found: Attribution, values: np.ndarray) -> np.ndarray:
    """How much something is needed: what a loss rises by without it; of any other target, how much it changes."""
    return values if found.about.is_loss else np.abs(values)


def _error(found: Attribution, spread: np.ndarray) -> np.ndarray:
    """The standard error of a mean of n sequences whose standard deviation, divided by n, is `spread`; of one sequence
    nobody knows it."""
    count = found.about.sequences
    return spread / np.sqrt(count - 1) if count > 1 else np.full(spread.shape, np.nan)


def _edges(layout, told: dict[str, np.ndarray]) -> pd.DataFrame:
    there = layout.triangle()
    row, column = np.nonzero(there)
    counts = there.sum(1)[row]
    frame = {
        "number": row + 1,
        "read": [layout.reads[r].label for r in row],
        "source": column,
        "from": [layout.sources[c].label for c in column],
        "kind": [layout.reads[r].kind for r in row],
        "sources": counts,
        "newest": column == counts - 1,
    }
    frame = pd.DataFrame(frame | {name: values[there].astype(float) for name, values in told.items()})
    return frame.assign(even=frame["weight"] * frame["sources"])


def layers(found: Attribution, method: str, run: Run | None = None) -> pd.DataFrame:
    """One row a layer: layer, place, kind, value, needed, spread, error, tokens, share (of the final state: measured with the
    attribution, else what `run` recorded at the nearest step, else blank)."""
    layout, blank = found.layout, np.full(len(found.layout.layers), np.nan)
    share = found.final_share[1:] if found.final_share is not None else blank
    if run is not None and not np.isfinite(share).any():
        share = recorded_share(run, found.step or 0)
    spread = found.layers_std.get(method, blank)
    return pd.DataFrame(
        {
            "layer": [layer.index for layer in layout.layers],
            "place": [layer.label for layer in layout.layers],
            "kind": [layer.kind for layer in layout.layers],
            "value": found.layers.get(method, blank).astype(float),
            "needed": _needed(found, found.layers.get(method, blank)).astype(float),
            "spread": spread.astype(float),
            "error": _error(found, spread).astype(float),
            "tokens": found.layers_token_std.get(method, blank).astype(float),
            "share": np.asarray(share, float),
        }
    )


def recorded_share(run: Run, step: int) -> np.ndarray:
    """[L] shares of the final state that a run recorded at the last step up to `step`; blank where it did not."""
    steps, values = series(run, "mixing_share")
    index = nearest(steps, step)
    return np.full(len(run.layers), np.nan) if index is None else values[index, -1, 1:]


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """number, read, kind, value: Spearman's rank correlation of weight and attribution (how much a source is needed) in
    each read of three sources or more; blank where either is all alike."""
    rows = []
    for (number, read, kind), part in frame.groupby(["number", "read", "kind"], sort=False):
        part = part.dropna(subset=["weight", "needed"])
        if len(part) < 3:
            continue
        alike = any(np.ptp(part[name]) <= 1e-9 * part[name].abs().max() for name in ("weight", "needed"))
        found = np.nan if alike else float(part["weight"].rank().corr(part["needed"].rank()))
        rows.append((number, read, kind, found))
    return pd.DataFrame(rows, columns=["number", "read", "kind", "value"])


def disagreements(frame: pd.DataFrame) -> pd.DataFrame:
    """With a `label` and an `odd`: the heaviest edges ("weight") among those whose effect is below the median, and the
    strongest ("effect") among those of less than an even share; in reads of three sources or more."""
    known = frame[frame["sources"] > 2].dropna(subset=["even", "value"])
    empty = frame.iloc[:0].assign(label="", odd="")
    if len(known) < 2 * NAMED or np.ptp(known["even"]) < 1e-9:
        return empty
    size = known["value"].abs()
    heavy = known[(known["even"] > 1) & (size <= size.median())].sort_values("even", ascending=False)
    strong = known[(known["even"] < 1) & (size > size.median())].sort_values(
        "value", key=np.abs, ascending=False
    )
    found = pd.concat([heavy.head(NAMED).assign(odd="weight"), strong.head(NAMED).assign(odd="effect")])
    if found.empty:
        return empty
    return found.assign(label=[link(row) for _, row in found.iterrows()])


def all_one(weight: np.ndarray | pd.Series) -> bool:
    """Whether weights are those of a plain sum."""
    known = np.asarray(weight, float)
    known = known[np.isfinite(known)]
    return bool(len(known)) and bool(np.abs(known - 1).max() < 1e-6)


def link(row: pd.Series) -> str:
    """ "12 ← 3", "final ← emb."."""
    return f"{words.short(row['read'])} ← {words.short(row['from'])}"


# Over removal and over training


def curve_frame(curve: Curve) -> pd.DataFrame:
    """ranking ("by weight" …), count, share (of all), value, low, high: of random orders the mean, and their range."""
    parts = []
    for ranking, name in RANKED.items():
        if ranking not in curve.values:
            continue
        values = np.atleast_2d(curve.values[ranking])
        parts.append(
            pd.DataFrame(
                {
                    "ranking": name,
                    "count": curve.counts,
                    "share": curve.counts / max(int(curve.counts[-1]), 1),
                    "value": values.mean(0),
                    "low": values.min(0),
                    "high": values.max(0),
                }
            )
        )
    return (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["ranking", "count", "value"])
    )


def alike(found: Attribution, everything: list[Attribution]) -> list[Attribution]:
    """Those that answer the question of `found` at each step: of the same target on the same data, by its methods at
    least; the latest where there are several."""
    same = {
        other.step: other
        for other in sorted(everything, key=lambda each: each.about.created)
        if all(getattr(other.about, name) == getattr(found.about, name) for name in _QUESTION)
        and found.edges.keys() <= other.edges.keys()
        and found.layers.keys() <= other.layers.keys()
    }
    return [same[step] for step in sorted(same)]


def layers_over_training(series: list[Attribution], method: str, most: int = 6) -> pd.DataFrame:
    """run (a layer's label), step, value: the layers with the largest effects at the last step."""
    parts = [layers(each, method).assign(step=each.step) for each in series if method in each.layers]
    if len(parts) < 2:
        return pd.DataFrame(columns=["run", "step", "value"])
    last = parts[-1].dropna(subset=["value"])
    chosen = last.loc[last["value"].abs().sort_values(ascending=False).index[:most], "place"]
    frame = pd.concat(parts, ignore_index=True)
    frame = frame[frame["place"].isin(chosen)]
    return frame.rename(columns={"place": "run"})[["run", "step", "value"]]


def agreement_over_training(series: list[Attribution], method: str) -> pd.DataFrame:
    """run, step, value: the median rank correlation of weight and attribution."""
    rows = [
        (each.step, correlations(edges(each, method))["value"].median())
        for each in series
        if method in each.edges
    ]
    frame = pd.DataFrame(rows, columns=["step", "value"]).dropna()
    return (
        frame.assign(run="median read") if len(frame) > 1 else pd.DataFrame(columns=["run", "step", "value"])
    )
