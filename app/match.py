"""Match: which step of one run answers a step of another: by loss, step, tokens or wall time."""

from dataclasses import dataclass

import numpy as np

from app import words
from app.frames import nearest, series
from probes import Run

WAYS = {"loss": "Loss", "step": "Step", "tokens": "Tokens", "time": "Wall time", "own": "Each its own step"}
SCALARS = {"loss": "loss", "tokens": "tokens", "time": "wall_time"}
SMOOTHED = 20  # logged losses averaged before they are compared
MEANING = (
    f"A loss is matched on the mean of the last {SMOOTHED} logged training losses, and on the lowest such mean so "
    "far: a step answers another when it is the first to have come as low."
)


@dataclass(frozen=True)
class Pair:
    """A step of each run, and why these two: `told` is one sentence."""

    first: int
    second: int
    told: str


def ways(a: Run, b: Run) -> dict[str, str]:
    """The ways in which two runs can be matched; two steps of one run are each their own."""
    if a is b:
        return {"own": WAYS["own"]}
    return {
        way: title
        for way, title in WAYS.items()
        if way not in SCALARS or (SCALARS[way] in a and SCALARS[way] in b)
    }


def pair(a: Run, b: Run, way: str, step: int | None, other: int | None, names: tuple[str, str]) -> Pair:
    """The two steps to compare; without a `step`, the last that both runs have."""
    last = a.last_step if step is None else step
    if way == "own":
        chosen = b.last_step if other is None else other
        return Pair(
            last, chosen, f"{names[0]} at step {words.step(last)}, {names[1]} at step {words.step(chosen)}."
        )
    if way == "step":
        common = min(last, b.last_step)
        return Pair(common, common, f"Both at step {words.step(common)}.")
    measure_a, measure_b = measured(a, way), measured(b, way)
    if step is None:
        target = _common(measure_a[1], measure_b[1], way)
        first = reached(*measure_a, target, way)
        first = last if first is None else first
    else:
        first = step
        at = nearest(measure_a[0], step)
        target = measure_a[1][at] if at is not None else np.nan
    second = reached(*measure_b, target, way)
    what = {"loss": "a mean training loss of", "tokens": "tokens", "time": "seconds"}[way]
    value = words.number(float(target)) if way == "loss" else f"{target:,.0f}"
    steps = f"{names[0]} at step {words.step(first)}, {names[1]} at step"
    if second is None:
        return Pair(
            first,
            b.last_step,
            f"{names[1]} never came to {what} {value}: {steps} {words.step(b.last_step)}, its last.",
        )
    return Pair(first, second, f"Matched at {what} {value}: {steps} {words.step(second)}.")


def measured(run: Run, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the growing or falling measure they are matched by; a loss as its lowest running mean."""
    steps, values = series(run, SCALARS[way])
    values = values.astype(np.float64)
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if way != "loss" or not len(values):
        return steps, values
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(1, len(values) + 1) - SMOOTHED, 0)
    mean = (total[1:] - total[start]) / (np.arange(1, len(values) + 1) - start)
    return steps, np.minimum.accumulate(mean)


def reached(steps: np.ndarray, values: np.ndarray, target: float, way: str) -> int | None:
    """The first step at which the measure had come to `target`; None when it never did."""
    there = values <= target if way == "loss" else values >= target
    return int(steps[np.argmax(there)]) if len(steps) and there.any() else None


def _common(a: np.ndarray, b: np.ndarray, way: str) -> float:
    """What both runs came to at last."""
    if not len(a) or not len(b):
        return np.nan
    return float(max(a[-1], b[-1]) if way == "loss" else min(a[-1], b[-1]))
