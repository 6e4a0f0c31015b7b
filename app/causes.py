"""Causes: what attribution found as rows of frames, and in sentences. Needs no torch.

A value is the target without an edge or a layer minus the target with it: of a loss, above zero means needed.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import cells, words
from app.frames import nearest, series
from probes import Run
from probes.attributed import (
    ABLATION,
    EDGES,
    EFFECT,
    GRADIENT,
    LAYERS,
    METHODS,
    RANDOM,
    REMOVAL,
    SHARE,
    TITLES,
    WEIGHT,
    Attribution,
    Curve,
)

LIVE = "depth_attribution"
HIGH = 1.5  # even shares from which on a weight is high
SMALL = 1e-3  # of the loss: an effect that is surely below it is none
SMALLEST = 1e-2  # of the largest effect, where the target is no loss
NAMED = 3  # disagreements named on each side
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
    even shares), weight, share, value, spread (standard deviation over sequences), error (of the mean), tokens (standard
    deviation over tokens, blank where not known)."""
    blank = np.full(found.layout.triangle().shape, np.nan)
    spread = found.edges_std.get(method, blank)
    return _edges(
        found.layout,
        {
            "weight": found.weight if found.weight is not None else blank,
            "share": found.share if found.share is not None else blank,
            "value": found.edges.get(method, blank),
            "spread": spread,
            "error": spread / np.sqrt(max(found.about.sequences, 1)),
            "tokens": found.edges_token_std.get(method, blank),
        },
    )


def live(run: Run, step: int) -> pd.DataFrame:
    """The same of the attribution that was recorded while training, at the last step up to `step`; empty without."""
    steps, _ = series(run, LIVE)
    index = nearest(steps, step)
    if index is None:
        return pd.DataFrame(
            columns=["number", "read", "source", "from", "sources", "even", "weight", "value"]
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
        {name: blank for name in ("share", "spread", "error", "tokens")} | {"weight": weight, "value": value},
    )


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
    """One row a layer: layer, place, kind, value, spread, error, tokens, share (of the final state: measured with the
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
            "spread": spread.astype(float),
            "error": (spread / np.sqrt(max(found.about.sequences, 1))).astype(float),
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
    """number, read, kind, value: Spearman's rank correlation of weight and attribution in each read of three sources or
    more; blank where the weights are all alike."""
    rows = []
    for (number, read, kind), part in frame.groupby(["number", "read", "kind"], sort=False):
        part = part.dropna(subset=["weight", "value"])
        if len(part) < 3:
            continue
        alike = any(np.ptp(part[name]) <= 1e-9 * part[name].abs().max() for name in ("weight", "value"))
        found = np.nan if alike else float(part["weight"].rank().corr(part["value"].rank()))
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


def link(row: pd.Series) -> str:
    """ "12 ← 3", "final ← emb."."""
    return f"{_short(row['read'])} ← {_short(row['from'])}"


def _short(label: str) -> str:
    if label in ("embedding", "final read"):
        return {"embedding": "emb.", "final read": "final"}[label]
    number = next((word for word in label.split() if word.isdecimal()), label)
    return f"b{number}" if label.startswith("depth block") else number


# Findings


def small(found: Attribution) -> float:
    """Below this an effect is none."""
    if found.about.target == "loss":
        return SMALL * abs(found.about.value)
    known = [np.nanmax(np.abs(values)) for values in (*found.edges.values(), *found.layers.values())]
    return SMALLEST * float(max(known, default=0.0))


@dataclass(frozen=True)
class Idle:
    """Links of high weight (`HIGH` even shares) whose effect is surely none, heaviest first, out of so many; by ablation."""

    links: pd.DataFrame
    heavy: pd.DataFrame
    limit: float
    unit: str
    sequences: int

    def sentence(self) -> str:
        what = f"a weight of {HIGH:g} even shares or more"
        limit = f"surely below {words.number(self.limit)} {self.unit}"
        if self.heavy.empty:
            return f"No link has {what}: there is none of high weight and no effect."
        if self.links.empty:
            least = self.heavy.loc[self.heavy["value"].abs().idxmin()]
            return (
                f"There is no link of high weight and no effect: of {len(self.heavy)} links with {what}, ablation finds "
                f"none with an effect {limit}; the least is {_effect(least, self.unit)} of {_link(least)}."
            )
        first = self.links.iloc[0]
        return (
            f"High weight and no effect: {_link(first)} has weight {first['weight']:.2f} ({first['even']:.1f} even shares), "
            f"and without it the {'loss' if self.unit.startswith('nats') else 'target'} changes by "
            f"{_effect(first, self.unit)} (ablation, {self.sequences} sequences). Of {len(self.heavy)} links with "
            f"{what}, {len(self.links)} {'has' if len(self.links) == 1 else 'have'} an effect {limit}."
        )


def idle(found: Attribution) -> Idle | None:
    """Which links have a high weight and no effect, by ablation: the effect and two of its standard errors together are
    small. None where edges were not ablated or the weights are not known."""
    if ABLATION not in found.edges or found.weight is None:
        return None
    frame = edges(found, ABLATION)
    heavy = frame[(frame["sources"] > 2) & (frame["even"] >= HIGH)].sort_values("even", ascending=False)
    limit = small(found)
    if np.isfinite(frame["even"]).any() and np.allclose(frame["weight"].dropna(), 1):
        heavy = heavy.iloc[:0]  # a plain sum: every source has weight one
    links = heavy[heavy["value"].abs() + 2 * heavy["error"] <= limit]
    return Idle(links, heavy, limit, found.about.unit, found.about.sequences)


def ballast(found: Attribution) -> pd.DataFrame:
    """Layers without which the target is surely no worse than by next to nothing: value plus two standard errors is small.

    Rows of `layers`, least needed first; by removal, else the gradient. Empty where no layer is.
    """
    method = next((method for method in (REMOVAL, GRADIENT) if method in found.layers), None)
    if method is None:
        return layers(found, "").iloc[:0]
    frame = layers(found, method)
    found_small = frame["value"] + 2 * frame["error"] <= small(found)
    return frame[found_small].sort_values("value")


def ballast_sentence(found: Attribution) -> str:
    frame, unit = ballast(found), found.about.unit
    if frame.empty:
        limit = f"{words.number(small(found))} {unit}"
        return f"Ballast: none. Of no layer is it sure that the {found.about.target} rises by less than {limit} without it."
    told = words.joined(
        f"{row['place']} ({row['value']:+.2g} ± {2 * row['error']:.1g})"
        for _, row in frame.head(6).iterrows()
    )
    more = f" and {len(frame) - 6} more" if len(frame) > 6 else ""
    return f"Ballast, which can go for less than {words.number(small(found))} {unit}: {told}{more}."


def agreement(frame: pd.DataFrame) -> str:
    """How weight and attribution agree, over the reads."""
    known = correlations(frame).dropna(subset=["value"])
    if known.empty:
        return (
            "Weight and attribution cannot be compared here: no read of three sources has weights that differ"
        )
    worst = known.loc[known["value"].idxmin()]
    against = int((known["value"] < 0).sum())
    return (
        f"Rank correlation of weight and attribution: {known['value'].median():.2f} in the median read, "
        f"{worst['value']:.2f} in {words.the(str(worst['read']))}; negative in {against} of {len(known)} reads"
    )


def scatter_sentence(frame: pd.DataFrame) -> str:
    """The two largest disagreements."""
    odd = disagreements(frame)
    told = []
    for kind, words_for in (
        ("weight", "more weight than effect: {}"),
        ("effect", "more effect than weight: {}"),
    ):
        part = odd[odd["odd"] == kind]
        if len(part):
            told.append(words_for.format(_link(part.iloc[0])))
    return words.capital("; ".join(told)) if told else "Weight against attribution, edge by edge"


def needed(frame: pd.DataFrame) -> str:
    """The layer without which the target suffers most, and the one it misses least."""
    known = frame.dropna(subset=["value"])
    if known.empty:
        return "No layer was attributed"
    top, least = known.loc[known["value"].idxmax()], known.loc[known["value"].idxmin()]
    told = (
        f"Most needed is {top['place']} ({top['value']:+.3g}), least {least['place']} ({least['value']:+.2g})"
    )
    both = known.dropna(subset=["share"])
    if len(both) > 2 and np.ptp(both["share"]) > 0:
        found = float(both["value"].rank().corr(both["share"].rank()))
        told += f"; rank correlation with the share of the final state {found:.2f}"
    return told


def area(curve: Curve, ranking: str) -> float:
    """Mean rise of the target while up to half of all is removed, from the curve of a ranking (its mean, at random)."""
    values = curve.values[ranking]
    values = values.mean(0) if values.ndim == 2 else values
    half = curve.counts <= curve.counts[-1] / 2
    if half.sum() < 2:
        return float(values[-1] - values[0])
    counts, rise = curve.counts[half].astype(float), values[half] - values[0]
    return float(np.trapezoid(rise, counts) / np.ptp(counts))


def guide(curve: Curve, kind: str) -> str:
    """Which ranking was the better guide to what can be removed."""
    areas = {ranking: area(curve, ranking) for ranking in RANKED if ranking in curve.values}
    areas = {ranking: value for ranking, value in areas.items() if np.isfinite(value)}
    guides = {ranking: value for ranking, value in areas.items() if ranking != RANDOM}
    if not guides:
        return f"Nothing ranks the {kind}"
    best = min(guides, key=guides.get)
    others = words.joined(
        f"{value:+.3g} {RANKED[ranking]}"
        for ranking, value in sorted(areas.items(), key=lambda i: i[1])
        if ranking != best
    )
    beaten = "" if RANDOM not in areas or guides[best] < areas[RANDOM] else ", which is no better than chance"
    return (
        f"The better guide to {kind} is {_NOUN[best]}{beaten}: while half of them go, the least important first, the loss rises "
        f"by {guides[best]:+.3g} on average" + (f", against {others}" if others else "")
    )


_NOUN = {WEIGHT: "their weight", SHARE: "their share", EFFECT: "their attribution"}


def sentences(found: Attribution, name: str) -> list[str]:
    """All that is to be said of one file."""
    about = found.about
    told = [
        f"{name} at step {words.step(found.step or 0)}: the {about.target} is {about.value:.4g} on {about.sequences} sequences "
        f"of {about.tokens} tokens. {' '.join(about.notes)}".strip()
    ]
    methods = edge_methods(found)
    if methods:
        method = ABLATION if ABLATION in methods else methods[0]
        frame = edges(found, method)
        told.append(f"{agreement(frame)} ({words.small(TITLES[method])}).")
    if (links := idle(found)) is not None:
        told.append(links.sentence())
    for method in (REMOVAL, GRADIENT):
        if method in found.layers:
            told.append(f"{needed(layers(found, method))} ({words.small(TITLES[method])}).")
            told.append(ballast_sentence(found))
            break
    for kind in (LAYERS, EDGES):
        if kind in found.curves:
            told.append(f"{guide(found.curves[kind], kind)}.")
    return told


def _link(row: pd.Series) -> str:
    return f"{words.the(str(row['from']))} in {words.the(str(row['read']))}"


def _effect(row: pd.Series, unit: str) -> str:
    return f"{row['value']:+.2g} ± {2 * row['error']:.1g} {unit}"


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
    """The attributions of the same question at each step, the latest where there are several."""
    same = {
        other.step: other
        for other in sorted(everything, key=lambda each: each.about.created)
        if (other.about.target, other.about.mass) == (found.about.target, found.about.mass)
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
