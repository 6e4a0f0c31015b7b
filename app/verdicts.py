"""Verdicts: what attribution found, in sentences of computed numbers: links without effect, ballast, the better guide."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import words
from app.causes import RANKED, all_one, correlations, disagreements, edge_methods, edges, layers
from probes.attributed import (
    ABLATION,
    EDGES,
    EFFECT,
    GRADIENT,
    LAYERS,
    RANDOM,
    REMOVAL,
    SHARE,
    TITLES,
    WEIGHT,
    About,
    Attribution,
    Curve,
)  # fmt: skip

HIGH = 1.5  # even shares from which on a weight is high
SMALL = 1e-3  # of the loss: an effect that is surely below it is none
SMALLEST = 1e-2  # of the largest effect, where the target is no loss
_OF_LOSS = About()


def small(found: Attribution) -> float:
    """Below this an effect is none."""
    if found.about.is_loss:
        return SMALL * abs(found.about.value)
    known = [np.nanmax(np.abs(values)) for values in (*found.edges.values(), *found.layers.values())]
    return SMALLEST * float(max(known, default=0.0))


def plain(found: Attribution) -> bool:
    """Whether its model has no depth reads, or none whose weights are known: then nothing has a share of a softmax."""
    return found.weight is None or not np.isfinite(found.weight).any() or all_one(found.weight)


_ONE = "of one sequence there is no standard error (more of them: --sequences)"


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
        if self.sequences < 2:
            return f"Whether a link of high weight has no effect is not known: {_ONE}."
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
    small. None where edges were not ablated, or the weights are not known or all one, as in a plain sum."""
    if ABLATION not in found.edges or found.weight is None:
        return None
    if plain(found):
        return None
    frame = edges(found, ABLATION)
    heavy = frame[(frame["sources"] > 2) & (frame["even"] >= HIGH)].sort_values("even", ascending=False)
    limit = small(found)
    links = heavy[heavy["value"].abs() + 2 * heavy["error"] <= limit]
    return Idle(links, heavy, limit, found.about.unit, found.about.sequences)


def ballast(found: Attribution) -> pd.DataFrame:
    """Layers without which a loss surely rises by next to nothing, or any other target changes as little: that, plus two
    standard errors, is small.

    Rows of `layers`, least needed first; by removal, else the gradient. Empty where no layer is.
    """
    method = next((method for method in (REMOVAL, GRADIENT) if method in found.layers), None)
    if method is None:
        return layers(found, "").iloc[:0]
    frame = layers(found, method)
    return frame[frame["needed"] + 2 * frame["error"] <= small(found)].sort_values("needed")


def ballast_sentence(found: Attribution) -> str:
    frame, unit = ballast(found), found.about.unit
    if found.about.sequences < 2:
        return f"Ballast: not known, for {_ONE}."
    if frame.empty:
        limit = f"{words.number(small(found))} {unit}"
        return (
            f"Ballast: none. Of no layer is it sure that the {found.about.target} {_moves(found.about)} by less than {limit} "
            "without it."
        )
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


def _moves(about: About) -> str:
    return "rises" if about.is_loss else "changes"


def needed(frame: pd.DataFrame) -> str:
    """The layer without which the target suffers (or changes) most, and the one it misses least."""
    known = frame.dropna(subset=["needed"])
    if known.empty:
        return "No layer was attributed"
    top, least = known.loc[known["needed"].idxmax()], known.loc[known["needed"].idxmin()]
    told = (
        f"Most needed is {top['place']} ({top['value']:+.3g}), least {least['place']} ({least['value']:+.2g})"
    )
    both = known.dropna(subset=["share"])
    if len(both) > 2 and np.ptp(both["share"]) > 0:
        found = float(both["needed"].rank().corr(both["share"].rank()))
        told += f"; rank correlation with the share of the final state {found:.2f}"
    return told


def area(curve: Curve, ranking: str, about: About = _OF_LOSS) -> float:
    """Mean rise of a loss (of any other target, its mean change either way) while up to half of all is removed, from the
    curve of a ranking; at random, the mean over the orders."""
    values = np.atleast_2d(curve.values[ranking])
    rise = values - values[:, :1]
    rise = (rise if about.is_loss else np.abs(rise)).mean(0)
    half = curve.counts <= curve.counts[-1] / 2
    if half.sum() < 2:
        return float(rise[-1])
    counts = curve.counts[half].astype(float)
    return float(np.trapezoid(rise[half], counts) / np.ptp(counts))


def guide(curve: Curve, kind: str, about: About = _OF_LOSS) -> str:
    """Which ranking was the better guide to what can be removed."""
    areas = {ranking: area(curve, ranking, about) for ranking in RANKED if ranking in curve.values}
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
        f"The better guide to {kind} is {_NOUN[best]}{beaten}: while half of them go, the least important first, the "
        f"{about.target} {_moves(about)} by {guides[best]:+.3g} on average"
        + (f", against {others}" if others else "")
    )


_NOUN = {WEIGHT: "their weight", SHARE: "their share", EFFECT: "their attribution"}


def sentences(found: Attribution, name: str) -> list[str]:
    """All that is to be said of one file."""
    about = found.about
    told = [
        f"{name} at step {words.step(found.step or 0)}: the {about.target} is {about.value:.4g} on "
        f"{words.counted(about.sequences, 'sequence')} of {about.tokens} tokens. {' '.join(about.notes)}".strip()
    ]
    methods = edge_methods(found)
    if methods:
        method = ABLATION if ABLATION in methods else methods[0]
        if not plain(found):
            told.append(f"{agreement(edges(found, method))} ({words.small(TITLES[method])}).")
    if (links := idle(found)) is not None:
        told.append(links.sentence())
    for method in (REMOVAL, GRADIENT):
        if method in found.layers:
            told.append(f"{needed(layers(found, method))} ({words.small(TITLES[method])}).")
            told.append(ballast_sentence(found))
            break
    for kind in (LAYERS, EDGES):
        if kind in found.curves:
            told.append(f"{guide(found.curves[kind], kind, about)}.")
    return told


def _link(row: pd.Series) -> str:
    return f"{words.the(str(row['from']))} in {words.the(str(row['read']))}"


def _effect(row: pd.Series, unit: str) -> str:
    error = f" ± {2 * row['error']:.1g}" if np.isfinite(row["error"]) else ""
    return f"{row['value']:+.2g}{error} {unit}"
