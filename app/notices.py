"""Notices: what a run's own numbers say against it, a sentence each, for every page on which the run is shown."""

import numpy as np

from app import gaps, words
from app.frames import series
from probes import Run
from probes.finite import first_place, not_finite
from probes.vocabulary import metric

# What rounding alone does to the sum of the outputs (as probes/identity.py has it, which needs torch).
_ROUNDING = {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}
_EXACT = 1e-3
_EXPLAINED = 0.95  # of every state, by its outputs with the recovered weights


def warnings(run: Run) -> list[str]:
    """What makes the numbers doubtful: values that are not finite, a stream that does not add up."""
    return [told for told in (_states(run), _loss(run), "" if _weighed(run) else _identity(run)) if told]


def remarks(run: Run) -> list[str]:
    """What one should know beside the numbers: skipped steps, gaps in the recording, what could not be measured."""
    found = (_resumed(run), _weighed(run), _skipped(run), gaps.sentence(run), *_unmeasured(run))
    return [told for told in found if told]


def _states(run: Run) -> str:
    """The first step and place at which something was not finite: by what was counted, and by the sizes in between."""
    steps, counts = series(run, "nonfinite")
    bad = counts > 0
    found = (
        [(int(steps[row]), _place(run, bad[row])) for row in np.flatnonzero(bad.any(axis=1))[:1]]
        if bad.size
        else []
    )
    sized, states, outputs = _sizes(run)
    rows = np.flatnonzero(states.any(axis=1) | outputs.any(axis=1)) if len(sized) else ()
    found += [(int(sized[row]), first_place(run.layout, states[row], outputs[row])) for row in rows[:1]]
    if not found:
        return ""
    step, place = min(found, key=lambda each: each[0])
    looked = np.unique(np.concatenate([steps, sized]))
    before = looked[looked < step]
    finite = f"; at step {words.step(int(before[-1]))} all were finite" if len(before) else ""
    count = int(counts[steps == step].max(initial=0))
    held = f"{count:,} value{'s' if count > 1 else ''}" if count else "values"
    are = "is" if count == 1 else "are"
    return f"The {place} held {held} that {are} not finite at step {words.step(step)}, the first seen in this run{finite}."


def _place(run: Run, states: np.ndarray) -> str:
    return first_place(run.layout, states, np.zeros_like(states))


def _sizes(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and of each which states and outputs had no finite size though they have one at other steps."""
    steps, states = series(run, "hidden_rms")
    others, outputs = series(run, "output_rms")
    shared, here, there = np.intersect1d(steps, others, return_indices=True)
    states, outputs = (not_finite(x, np.isfinite(x).any(axis=0)) for x in (states[here], outputs[there]))
    return shared, states, outputs


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
    broken = errors > _ROUNDING.get(str(run.manifest.versions.get("dtype")), _EXACT)
    if not broken.any():
        return ""
    row = int(np.argmax(broken.any(axis=1)))
    state = int(np.argmax(broken[row]))
    return (
        f"The {_state(run, state)} is not the embedding plus the outputs before it: it is off by "
        f"{100 * errors[row, state]:.2g}% of its size at step {words.step(int(steps[row]))}. The model changes its "
        "stream in other ways too, so its outputs tell only a part."
    )


def _weighed(run: Run) -> str:
    """Where the outputs do explain every state, but not with weight one: the stream is rescaled or normed on its way."""
    if not _identity(run):
        return ""
    _, explained = series(run, "mixing_r2")
    explained = explained[np.isfinite(explained)]
    if not len(explained) or explained.min() < _EXPLAINED:
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
