"""Findings: what a chart shows, said in one sentence of computed numbers. Frames in, titles out."""

import numpy as np
import pandas as pd

from app import words
from app.derived import metric
from probes.vocabulary import STATE

COUNTED = (
    "*From layer 3*: the embedding starts tiny and the first transformer block leaps from it in every architecture, so "
    "growth is counted from behind that block, where there is more than one."
)
TAIL = 10  # recorded losses that a compared loss averages


def by_run(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The frame of each run, in the order the runs were given."""
    return [(str(run), part) for run, part in frame.groupby("run", sort=False)]


def growth(frame: pd.DataFrame, name: str) -> str:
    """How much a metric grows from the first to the last layer, run by run, at the shown step."""
    if frame.empty:
        return f"{metric(name).title}: nothing recorded yet"
    factors = [(run, _growth(part, name)) for run, part in by_run(frame)]
    ends, when = _ends(frame, name), _when(frame)
    if len(factors) == 1:
        run, value = factors[0]
        return f"{run}’s {_noun(name)} {_moves(value)} {ends} {when}"
    told = words.joined(f"{words.factor(value)} in {run}" for run, value in factors)
    return f"{words.capital(_noun(name))} {ends} {when}: {told}"


def side_by_side(frame: pd.DataFrame, name: str) -> str:
    """A metric at the end of the depth, run by run, each at its own step."""
    ends = [(run, part.iloc[-1]) for run, part in by_run(frame)]
    told = words.joined(
        f"{words.number(end['value'])} in {run.strip()}"
        + ("" if "step" in run else f" at step {words.step(int(end['step']))}")
        for run, end in ends
    )
    return f"{metric(name).title} {_place(str(ends[0][1]['place']))}: {told}"


def composition(frame: pd.DataFrame, name: str) -> str:
    """Which source is the largest part of the final state, run by run."""
    parts = [(run, part.dropna(subset=["value"])) for run, part in by_run(frame)]
    tops = [(run, part.loc[part["value"].idxmax()]) for run, part in parts if len(part)]
    if not tops:
        return f"{metric(name).title}: nothing recorded yet"
    told = words.joined(
        f"{words.the(str(top['place']))} in {run} ({words.percent(top['value'])})" for run, top in tops
    )
    return f"The largest part of the final state {_when(frame)} is {told}"


def doubling(frame: pd.DataFrame) -> str:
    """In which layer the state first is twice what the first layer received, run by run; "" where nothing is recorded."""
    found: dict[str, list[str]] = {}
    for run, part in by_run(frame.dropna(subset=["value"])):
        found.setdefault(doubled(part), []).append(run)
    never = words.joined(found.pop("", []))
    told = words.joined(f"by {layer} in {words.joined(runs)}" for layer, runs in found.items())
    if not told:
        return f"The hidden state nowhere comes to twice its first size in {never}." if never else ""
    return f"The hidden state has doubled {told}" + (f"; in {never} it never does." if never else ".")


def doubled(part: pd.DataFrame) -> str:
    """The layer behind which the state of one run first is twice the first one; "" where it never is."""
    ordered = part.sort_values("depth")
    there = np.flatnonzero(ordered["value"].to_numpy(float) >= 2 * float(ordered["value"].iloc[0]))
    # The state into a layer is what the layer before it has left.
    return str(ordered["place"].iloc[there[0] - 1]).removeprefix("into ") if len(there) else ""


def unevenness(frame: pd.DataFrame, name: str) -> str:
    """How far apart the largest and the smallest value over depth are, run by run (embedding left out)."""
    ratios = []
    for run, part in by_run(frame):
        values = part.loc[part["depth"] >= 1, "value"].to_numpy(float)
        values = values[np.isfinite(values)]
        ratios.append((run, values.max() / values.min() if len(values) and values.min() > 0 else np.nan))
    if not ratios:
        return f"{metric(name).title}: nothing recorded yet"
    noun, when = _noun(name), _when(frame)
    blank = [run for run, ratio in ratios if not np.isfinite(ratio)]
    if len(blank) == len(ratios):
        return f"{words.joined(blank)}: no finite {noun} {when}"
    if len(ratios) == 1:
        return f"{ratios[0][0]}’s largest {noun} is {words.factor(ratios[0][1])} its smallest {when}"
    told = words.joined(
        f"{words.factor(value)} {'the smallest ' if i == 0 else ''}in {run}"
        for i, (run, value) in enumerate(ratios)
    )
    return f"Largest {noun} {when}: {told}"


def grid(first: pd.DataFrame, last: pd.DataFrame, label: str, name: str) -> str:
    """Where the largest value over depth sits at the last recorded step, and what it was at the first."""
    end, start = _peak(last), _peak(first)
    if end is None:
        return f"{label}: no finite {_noun(name)} at step {words.step(int(last['step'].iloc[0]))}"
    now = f"{words.number(end['value'])} at step {words.step(int(end['step']))}"
    told = f"{label}: largest {_place(str(end['place']))}, {now}"
    if start is None or start["step"] == end["step"]:
        return told
    return f"{told}, {words.number(start['value'])} at step {words.step(int(start['step']))}"


def _peak(frame: pd.DataFrame) -> pd.Series | None:
    known = frame[np.isfinite(frame["value"].astype(float))]
    return None if known.empty else known.loc[known["value"].idxmax()]


def evenness(frame: pd.DataFrame, column: str) -> str:
    """The last finite CV or max/min over depth, run by run, and at which step."""
    known = frame.dropna(subset=[column])
    parts, steps = [], []
    for run, part in by_run(known):
        value = part[column].iloc[-1]
        steps.append(int(part["step"].iloc[-1]))
        parts.append((run, words.factor(value) if column == "ratio" else words.number(value)))
    what = {"ratio": "Max/min over depth", "cv": "CV over depth", "gini": "Gini over depth"}[column]
    if not parts:
        return f"{what}: no finite values recorded"
    told = words.joined(f"{value} in {run}" for run, value in parts)
    return f"{what} {_when(pd.DataFrame({'step': steps}))}: {told}"


def picture(cells: pd.DataFrame, label: str, name: str) -> str:
    """What a read × source picture of one metric shows."""
    known = cells[cells[name].notna()] if name in cells else cells[:0]
    if known.empty:
        return f"{label}: no {_noun(name)} recorded at this step"
    told = {
        "contribution_rms": contributions,
        "depth_attribution": attributions,
        "mixing_weight": recovered,
        "mixing_share": shares,
    }
    return told.get(name, routing)(known, label)


def tokens(line: pd.DataFrame, run: str, read: str, source: str, step: int) -> str:
    """At which token a read takes most and least from one source."""
    about = f"What {words.the(read)} of {run} reads from {words.the(source)} at step {words.step(step)}"
    known = line[line["weight"].notna()]
    if known.empty:
        return f"{about}: nothing recorded"
    most, least = (known.loc[at] for at in (known["weight"].idxmax(), known["weight"].idxmin()))
    if most["weight"] - least["weight"] < 0.005:
        return f"{about}: {known['weight'].mean():.2f} for every token"
    return (
        f"{about}: {most['weight']:.2f} at {most['told']} (token {most['token']}), "
        f"{least['weight']:.2f} at {least['told']} (token {least['token']}), {known['weight'].mean():.2f} on average"
    )


def token_sources(grid: pd.DataFrame, read: str) -> str:
    """Which source most tokens lean on in one read."""
    known = grid[grid["weight"].notna()]
    if known.empty:
        return f"Sources of {words.the(read)}: nothing recorded"
    top = known.loc[known.groupby("token")["weight"].idxmax(), "from"].astype(str).value_counts()
    count = int(known["token"].nunique())
    first = (
        f"{words.the(top.index[0])} is what {top.iloc[0]} of {count} tokens lean on most in {words.the(read)}"
    )
    second = f", {words.the(top.index[1])} {top.iloc[1]}" if len(top) > 1 else ""
    return words.capital(first + second)


def routing(cells: pd.DataFrame, label: str) -> str:
    """Share of the newest source and of the embedding, over the reads with more than two sources."""
    newest, embedding, when = _ends_of_reads(cells, "depth_weight")
    if not newest:
        return f"{label} {when}"
    return f"{label} {when}: {newest} of the weight goes to the newest source, {embedding} to the embedding"


def shares(cells: pd.DataFrame, label: str) -> str:
    """How much of a state the newest source and the embedding make up."""
    newest, embedding, when = _ends_of_reads(cells, "mixing_share")
    if not newest:
        return f"{label} {when}"
    return f"{label} {when}: the newest source makes up {newest} of a state, the embedding {embedding}"


def recovered(cells: pd.DataFrame, label: str) -> str:
    """Whether the recovered weights are those of a sum, else where they lie."""
    weight, when = cells["mixing_weight"], _when(cells)
    low, high = float(weight.min()), float(weight.max())
    if low >= 0.98 and high <= 1.02:
        solved, states = cells["read"].nunique(), len(cells["read"].cat.categories)
        where = "every state" if solved == states else f"the {solved} of {states} states that could be solved"
        return f"{label} {when}: every source has weight {weight.mean():.2f} in {where}, as in a plain sum"
    return f"{label} {when}: recovered weights from {low:.2f} to {high:.2f}"


def attributions(cells: pd.DataFrame, label: str) -> str:
    """The read of a source that the loss leans on most."""
    peak = cells.loc[cells["depth_attribution"].abs().idxmax()]
    return (
        f"{label} {_when(cells)}: the loss changes most, by {peak['depth_attribution']:+.2g}, without "
        f"{words.the(str(peak['from']))} in {words.the(str(peak['read']))}"
    )


def _ends_of_reads(cells: pd.DataFrame, name: str) -> tuple[str, str, str]:
    """Mean share of the newest source and of the embedding over reads of three sources or more, and the step."""
    wide, when = cells[cells["sources"] > 2], _when(cells)
    newest, embedding = wide.loc[wide["newest"], name].mean(), wide.loc[wide["source"] == 0, name].mean()
    return (words.percent(newest), words.percent(embedding), when) if len(wide) else ("", "", when)


def contributions(cells: pd.DataFrame, label: str) -> str:
    """Which source adds most over all reads of one triangle."""
    known = cells.dropna(subset=["contribution_rms"])
    if known.empty:
        return f"{label}: no contributions recorded at this step"
    peak = known.loc[known["contribution_rms"].idxmax()]
    return (
        f"{label} at step {words.step(int(peak['step']))}: the largest contribution is "
        f"{words.number(peak['contribution_rms'])}, {peak['from']} in the read of {peak['read']}".replace(
            "the read of final read", "the final read"
        )
    )


def decisiveness(frame: pd.DataFrame) -> str:
    """Mean entropy over the shown reads, run by run."""
    parts = [(run, part["value"].mean()) for run, part in by_run(frame.dropna(subset=["value"]))]
    if not parts:
        return "Depth entropy: nothing recorded yet"
    told = words.joined(f"{value:.2f} in {run}" for run, value in parts)
    return f"Mean depth entropy is {told} {_when(frame)} (1 is an even average)"


def losses(frame: pd.DataFrame, name: str) -> str:
    """The metric at the last step all runs reached; a loss, which jumps from batch to batch, as a mean of ten."""
    parts = [(run, part.dropna(subset=["value"])) for run, part in by_run(frame)]
    parts = [(run, part) for run, part in parts if len(part)]
    title = metric(name).title
    if not parts:
        return f"{title}: nothing recorded yet"
    common = min(int(part["step"].iloc[-1]) for _, part in parts)
    tail = TAIL if name == "loss" else 1
    tails = [(run, part.loc[part["step"] <= common, "value"].tail(tail)) for run, part in parts]
    tail = max(len(values) for _, values in tails)  # a young run has fewer
    means = [(run, values.mean()) for run, values in tails]
    means = sorted(((run, value) for run, value in means if np.isfinite(value)), key=lambda pair: pair[1])
    if not means:
        return f"{title} of {words.joined(run for run, _ in parts)}"
    told = words.joined(f"{words.number(value)} in {run}" for run, value in means)
    meant = f" (mean of {tail} recorded losses)" if tail > 1 else ""
    return f"{title} at step {words.step(common)}: {told}{meant}"


def _first(part: pd.DataFrame) -> int:
    """Where growth is counted from: behind the first transformer block where there is more than one.

    The embedding starts tiny and the first block leaps from it, in every architecture: counted from there, all
    would seem to grow.
    """
    return 3 if part["depth"].max() > 4 else 1


def _growth(part: pd.DataFrame, name: str) -> float:
    first = 1 if name.startswith("block_") else _first(part)
    values = part.loc[part["depth"] >= first, "value"].to_numpy(float)
    return float(values[-1] / values[0]) if len(values) and values[0] > 0 else np.nan


def _moves(value: float) -> str:
    if not np.isfinite(value):
        return "cannot be compared"
    if 0.95 <= value < 1.05:
        return f"stays level ({words.factor(value)})"
    return f"grows {words.factor(value)}" if value >= 1 else f"falls to {words.factor(value)}"


def _ends(frame: pd.DataFrame, name: str) -> str:
    if name.startswith("block_"):
        return "from the first to the last transformer block"
    last = "the final state" if metric(name).axes == STATE else "the last layer"
    return f"from layer {_first(frame)} to {last}"


def _place(place: str) -> str:
    if place in ("embedding", "final state", "final read"):
        return f"at the {place}"
    return place if place.startswith("into ") else f"at {place}"


def _noun(name: str) -> str:
    return words.small(metric(name).title)


def _when(frame: pd.DataFrame) -> str:
    steps = sorted({int(step) for step in frame["step"]})
    if len(steps) == 1:
        return f"at step {words.step(steps[0])}"
    return f"at steps {words.step(steps[0])}–{words.step(steps[-1])}"
