"""Notices: what a run's own numbers say against it, a sentence each, for every page on which the run is shown."""

from collections.abc import Callable

import numpy as np

from app import gaps, words
from app.frames import nearest, series
from probes import Run
from probes.finite import first_place, not_finite
from probes.series import Binned
from probes.vocabulary import metric

# What rounding alone does to the sum of the outputs (as probes/identity.py has it, which needs torch).
_ROUNDING = {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}
_EXACT = 1e-3
SIZES = ("hidden_rms", "output_rms")
_EXPLAINED = 0.95  # of every state, by its outputs with the recovered weights


def warnings(run: Run) -> list[str]:
    """What makes the numbers doubtful: values that are not finite, a stream that does not add up."""
    if "warnings" not in run.kept:
        found = (_states(run), _loss(run), "" if _weighed(run) else _identity(run))
        run.kept["warnings"] = [told for told in found if told]
    return run.kept["warnings"]


def remarks(run: Run) -> list[str]:
    """What one should know beside the numbers: skipped steps, gaps in the recording, what could not be measured."""
    found = (_resumed(run), _weighed(run), _skipped(run), gaps.sentence(run), *_unmeasured(run))
    return [told for told in found if told]


def _states(run: Run) -> str:
    """The first step and place at which something was not finite: by what was counted, and by the sizes in between."""
    steps, counts = series(run, "nonfinite")
    found = []
    if (row := _first(run, "nonfinite", lambda bins: bins.high > 0)) is not None:
        found.append((int(steps[row]), _place(run, counts[row] > 0)))
    sized = {name: series(run, name) for name in SIZES}
    if all(len(known) for known, _ in sized.values()):
        found += _sizes(run, sized)
    if not found:
        return ""
    step, place = min(found, key=lambda each: each[0])
    looked = [known[known < step] for known in (steps, *(known for known, _ in sized.values()))]
    before = max((int(known[-1]) for known in looked if len(known)), default=None)
    finite = f"; at step {words.step(before)} all were finite" if before is not None else ""
    at = nearest(steps, step)
    count = int(counts[at].max(initial=0)) if at is not None and steps[at] == step else 0
    held = f"{count:,} value{'s' if count > 1 else ''}" if count else "values"
    are = "is" if count == 1 else "are"
    return f"The {place} held {held} that {are} not finite at step {words.step(step)}, the first seen in this run{finite}."


def _place(run: Run, states: np.ndarray) -> str:
    return first_place(run.layout, states, np.zeros_like(states))


def _sizes(run: Run, sized: dict[str, tuple]) -> list[tuple[int, str]]:
    """The first step at which a state or an output had no finite size though its place has one at other steps, and where."""
    seen = {name: _ever(run, name) for name in SIZES}
    steps = []
    for name, (known, _) in sized.items():
        row = _first(run, name, lambda bins, name=name: (bins.nonfinite > 0) & seen[name])
        steps += [int(known[row])] if row is not None else []
    if not steps:
        return []
    places = []
    for name, (known, values) in sized.items():
        at = nearest(known, min(steps))
        there = at is not None and known[at] == min(steps)
        places.append(not_finite(values[at], seen[name]) if there else np.zeros_like(seen[name]))
    return [(min(steps), first_place(run.layout, *places))]


def _ever(run: Run, name: str) -> np.ndarray:
    """bool: which places have a finite value at any step."""
    return np.isfinite(run.series(name).bins(1).high[0])


def _first(run: Run, name: str, test: Callable[[Binned], np.ndarray]) -> int | None:
    """The number of the first row of a metric for which `test` is true, of its bins by those of many rows; None if none."""
    return run.series(name).first(test) if name in run else None


def _loss(run: Run) -> str:
    told = []
    for name in ("loss", "val_loss", "grad_norm"):
        steps, values = series(run, name)
        bad = ~np.isfinite(values)
        if bad.any():
            title, first = words.small(metric(name).title), words.step(int(steps[np.argmax(bad)]))
            times = int(bad.sum())
            since = "from" if bad[np.argmax(bad) :].all() and times > 1 else "at"
            again = "once" if times == 2 else f"{times - 1:,} times"
            more = f" and {again} later" if since == "at" and times > 1 else ""
            told.append(f"the {title} is not finite {since} step {first}{' on' * (since == 'from')}{more}")
    return words.capital(words.joined(told)) + "." if told else ""


def _identity(run: Run) -> str:
    """Where a run without depth reads does not add up: its states are then not what its outputs make."""
    steps, errors = series(run, "identity_error")
    if "depth_weight" in run or not len(steps):
        return ""
    limit = _ROUNDING.get(str(run.manifest.versions.get("dtype")), _EXACT)
    row = _first(run, "identity_error", lambda bins: bins.high > limit)
    if row is None:
        return ""
    error = errors[row]
    state = int(np.argmax(error > limit))
    return (
        f"The {_state(run, state)} is not the embedding plus the outputs before it: it is off by "
        f"{100 * error[state]:.2g}% of its size at step {words.step(int(steps[row]))}. The model changes its "
        "stream in other ways too, so its outputs tell only a part."
    )


def _weighed(run: Run) -> str:
    """Where the outputs do explain every state, but not with weight one: the stream is rescaled or normed on its way."""
    if not _identity(run):
        return ""
    least = np.nanmin(run.series("mixing_r2").bins(1).low, initial=np.inf) if "mixing_r2" in run else np.inf
    if not _EXPLAINED <= least < np.inf:
        return ""
    return (
        "This residual rescales its stream: its states are sums of its outputs with weights other than one, which Depth "
        "attention shows as recovered mixing."
    )


def _skipped(run: Run) -> str:
    steps, counts = series(run, "skipped")
    if not (counts > 0).any():
        return ""
    last = words.step(int(steps[np.flatnonzero(counts > 0)[-1]]))
    total = int(np.nansum(counts))
    many = f"{total:,} attempts, the last" if total > 1 else "one attempt,"
    return f"The loss scaler skipped {many} at step {last}, because gradients were not finite."


def _resumed(run: Run) -> str:
    begun = [words.step(attempt.step) for attempt in run.attempts[1:]]
    return f"Continued from step {words.joined(begun)}." if begun else ""


def _unmeasured(run: Run) -> list[str]:
    """Metrics that the recorder gave up, by their cause."""
    causes: dict[str, list[str]] = {}
    for attempt in run.attempts:
        missing = attempt.told.get("missing")
        for name, told in missing.items() if isinstance(missing, dict) else ():
            if isinstance(told, dict):
                what = words.small(metric(str(name)).title)
                causes.setdefault(f"from step {told.get('step')} on: {told.get('cause')}", []).append(what)
    return [f"Could not be measured {cause}: {words.joined(names)}." for cause, names in causes.items()]


def _state(run: Run, row: int) -> str:
    label = run.layout.states[row]
    return f"state {label}" if label.startswith("into ") else label
