"""Gaps: steps that the schedule names and nobody recorded, since recording paused, or a shard is broken.

Lines are not drawn across them and a heatmap leaves them empty. `run.gaps` knows the cause of those that the recorder
saw; steps that were due and are in no shard are seen here.
"""

from dataclasses import dataclass

import numpy as np

from app import words
from probes import Run
from probes.vocabulary import metric

USUAL = 1.5  # a distance up to this many times a metric's usual one is its own cadence, not a gap


@dataclass(frozen=True)
class Gap:
    """Nothing was recorded between the steps `after` and `until`, though `missing` was due."""

    after: int
    missing: int
    until: int


def gaps(run: Run) -> list[Gap]:
    """The gaps in what the probes recorded over depth, by the schedule in run.json; scalars have cadences of their own."""
    if "gaps" not in run.kept:
        run.kept["gaps"] = _gaps(run)
    return run.kept["gaps"]


def _gaps(run: Run) -> list[Gap]:
    steps = together([run.steps(name) for name in run.metrics if metric(name).axes])
    vectors, matrices = run.manifest.vectors, run.manifest.matrices
    apart = np.diff(steps)
    # Most neighbours are as close as the interval puts them: only the others are worth asking about.
    wide = apart > (
        vectors.interval if vectors.interval and not (vectors.ranges or vectors.per_decade) else 1
    )
    found = []
    for at in np.flatnonzero(wide):
        after, until = int(steps[at]), int(steps[at + 1])
        due = [step for step in (vectors.next(after), matrices.next(after)) if step is not None]
        if due and min(due) < until:
            found.append(Gap(after, min(due), until))
    return found


def together(recorded: list[np.ndarray]) -> np.ndarray:
    """All steps that are in any of the arrays, each once, ascending."""
    # Most metrics share one array of steps, and the matrices' are a part of it.
    distinct = sorted({id(steps): steps for steps in recorded}.values(), key=len, reverse=True)
    every = distinct[0] if distinct else np.empty(0, np.int64)
    for steps in distinct[1:]:
        at = np.minimum(np.searchsorted(every, steps), len(every) - 1)
        if len(steps) and (every[at] != steps).any():
            every = np.sort(np.concatenate([every, steps]), kind="stable")
    return every[np.diff(every, prepend=-1) > 0]


def cuts(run: Run, steps: np.ndarray) -> np.ndarray:
    """int64: the numbers of the rows, of a metric recorded at these steps, before which there is a gap."""
    key = "cuts", id(steps)
    if key not in run.kept:
        run.kept[key] = _cuts(run, steps), steps  # kept too, so that no other array gets its number
    return run.kept[key][0]


def _cuts(run: Run, steps: np.ndarray) -> np.ndarray:
    found = []
    if len(steps) > 1 and gaps(run):
        usual = USUAL * float(np.median(np.diff(steps)))
        for gap in gaps(run):
            at = int(np.searchsorted(steps, gap.missing))
            if 0 < at < len(steps) and steps[at] > gap.missing and steps[at] - steps[at - 1] > usual:
                found.append(at)
    return np.unique(np.array(found, np.int64))


def segments(run: Run, steps: np.ndarray) -> np.ndarray:
    """int32 [N]: for each row of a metric, how many gaps lie before it. A line is drawn within one number only."""
    jumps = np.zeros(len(steps), np.int32)
    jumps[cuts(run, steps)] = 1
    return np.cumsum(jumps, dtype=np.int32)


def sentence(run: Run, most: int = 3) -> str:
    """ "Nothing was recorded between steps 120 and 200." Empty where there is no gap but those that `run.gaps` explains."""
    found = [
        gap for gap in gaps(run) if not any(known.first <= gap.missing <= known.last for known in run.gaps)
    ]
    if not found:
        return ""
    told = [f"{words.step(gap.after)} and {words.step(gap.until)}" for gap in found[:most]]
    more = f", and in {len(found) - most} more gaps" if len(found) > most else ""
    return f"Nothing was recorded between steps {words.joined(told, 'nor between')}{more}."
