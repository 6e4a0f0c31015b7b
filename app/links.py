"""Links: which read leans on which source, in sentences, with how the weight has moved so far."""

from dataclasses import dataclass

import numpy as np

from app import cells, reading, words
from app.frames import finite, nearest
from app.reading import series
from probes import Run

STANDS_OUT = 0.1  # a link is at least this share of its read's mean above it: rounding is no preference
STILL = 0.02  # a weight that stays within this of its present value has not moved


@dataclass(frozen=True)
class Link:
    """One strong read: its value, how far it is above the read's even average (in size, where it is signed), and its trend."""

    read: str
    source: str
    value: float
    excess: float
    trend: str  # "rising", "falling", "steady" or "" with a single recorded step
    since: int
    row: int = 0  # the read, from 1
    column: int = 0  # the source, from 0

    def sentence(self, name: str = "depth_weight") -> str:
        """ "Layer 12 (MLP) reads layer 3 (attention) with 0.61, rising since step 300"."""
        told = f", {self.trend} since step {words.step(self.since)}" if self.trend else ""
        read = words.capital(words.the(self.read))
        source = words.the(self.source)
        if name == "contribution_rms":
            return f"{read} gets {words.number(self.value)} RMS from {source}{told}"
        if name == "depth_attribution":
            return f"Without {source} in {words.the(self.read)} the loss changes by {self.value:+.2g}{told}"
        if name == "mixing_weight":
            return f"{read} receives {source} with weight {self.value:.2f}{told}"
        if name == "mixing_share":
            state = "The final state" if self.read == "final read" else f"The state into {self.read}"
            return f"{state} is {words.percent(self.value)} {self.source}{told}"
        return f"{read} reads {source} with {self.value:.2f}{told}"


def strongest(
    run: Run, step: int, name: str = "depth_weight", kind: str = "all", count: int = 8
) -> list[Link]:
    """The `count` links furthest above their read's mean, newest source left out, most outstanding first.

    Against the mean (for weights 1 / number of sources), because a read of two sources gives half to each
    without preferring any.
    """
    steps, values = series(run, name)
    index = nearest(steps, step)
    if index is None:
        return []
    labels, counts = cells.columns(run, name), cells.exists(run, name).sum(axis=1)
    found = []
    for row in cells.rows(run, kind):
        if counts[row] < 2:
            continue
        line = finite(values[index, row, : counts[row]].astype(np.float64))
        if name == "depth_attribution":  # signed: an effect is large on either side of zero
            line = np.abs(line)
        if not np.isfinite(line).any():
            continue
        mean = np.nanmean(line)
        excess = line - mean
        found += [
            (float(excess[s]), row, s) for s in range(counts[row] - 1) if excess[s] > STANDS_OUT * abs(mean)
        ]
    found.sort(key=lambda link: (-link[0], link[1], link[2]))
    links = []
    if not found:
        return links
    when, pasts = reading.course(run, name, [(row, column) for _, row, column in found[:count]], index)
    for (excess, row, column), past in zip(found[:count], pasts.T, strict=True):
        trend, since = trend_of(when, past, _still(past, name))
        links.append(
            Link(
                run.reads[row].label,
                labels[column],
                float(past[-1]),
                excess,
                trend,
                since,
                row + 1,
                column,
            )
        )
    return links


def trend_of(steps: np.ndarray, values: np.ndarray, still: float = STILL) -> tuple[str, int]:
    """How a series came to its last value: ("rising" | "falling" | "steady" | "", the step since when).

    Steady when the value has stayed within `still` for half of the recorded steps or more; else rising since
    it left the lowest (falling since the highest) point from which it never went back by more than `still`.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values) < 2:
        return "", int(steps[-1]) if len(steps) else 0
    moved = np.nonzero(np.abs(values - values[-1]) > still)[0]
    first = int(moved[-1]) + 1 if len(moved) else 0
    if len(values) - first >= max(2, len(values) / 2):
        return "steady", int(steps[first])
    up, down = _run_up(values, still), _run_up(-values, still)
    start = up if values[-1] - values[up] >= values[down] - values[-1] else down
    if abs(values[-1] - values[start]) <= still:
        return "steady", int(steps[first])
    return ("rising" if values[-1] > values[start] else "falling"), int(steps[start])


def _run_up(values: np.ndarray, still: float) -> int:
    """Index where `values` left the low point from which they climbed to their end."""
    low, first = values[-1], len(values) - 1
    for i in range(len(values) - 2, -1, -1):
        if values[i] > low + still:
            break
        low, first = min(low, values[i]), i
    return first + int(np.nonzero(values[first:] <= low + still / 2)[0][-1])


def _still(values: np.ndarray, name: str) -> float:
    """Shares have a natural scale; a contribution is still within 5% of its largest value."""
    return (
        STILL
        if name in ("depth_weight", "mixing_share")
        else 0.05 * float(np.nanmax(np.abs(values), initial=0.0))
    )
