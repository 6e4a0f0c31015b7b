"""A metric over depth, as two pages draw it: lines at one step, and a layer × step heatmap per run."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import streamlit as st

from app import cells, draw, findings, frames, reading, room, view, words
from app.charts.profile import profile
from app.charts.training import over_training
from app.derived import FINAL_SHARE, metric

ACROSS = 3  # heatmaps side by side


def profiles(
    shown: Sequence[room.Shown],
    name: str,
    step: int | None,
    scale: str,
    finding: Callable[[pd.DataFrame, str], str],
    fill: dict | None = None,
    everywhere: bool = True,
) -> None:
    """One line a run at its last recorded step up to `step`; says which step where it is another one. What not every layer
    has (`everywhere`) may be blank without a word."""
    have = room.recorded(shown, name)
    parts = {one: frames.profile(one.run, one.name, name, step) for one in have} if step is not None else {}
    parts = {one: part for one, part in parts.items() if len(part)}
    parts = finite(parts, name, step)
    if not parts:
        return
    frame = pd.concat(parts.values(), ignore_index=True)
    chart = profile(frame, name, room.colours(list(parts)), finding(frame, name), scale, fill=fill)
    draw.show(chart, key=f"profile {name}", data=frame, frames=_playback(list(parts), name, frame, scale))
    note = nearest({one.name: int(part["step"].iloc[0]) for one, part in parts.items()}, step)
    late = [one.name for one in have if one not in parts]
    if late:
        note += f" Nothing was recorded up to step {words.step(step)} in {words.joined(late)}."
    hidden = (
        int((~(frame["value"] > 0)).sum()) if scale == "log" else int((~np.isfinite(frame["value"])).sum())
    )
    if hidden and everywhere:
        note += f" {hidden} blank{'s' if hidden > 1 else ''}: not finite" + (
            ", or zero on this scale." if scale == "log" else "."
        )
    if note.strip():
        st.caption(words.plain(note.strip()))


def finite(
    parts: dict[room.Shown, pd.DataFrame], name: str, step: int | None
) -> dict[room.Shown, pd.DataFrame]:
    """The profiles that hold a finite value; of the others it is said that they hold none."""
    there = {one: part for one, part in parts.items() if part["value"].notna().any()}
    _not_finite([one for one in parts if one not in there], name, step)
    return there


def _not_finite(lost: list[room.Shown], name: str, step: int) -> None:
    """Runs of which nothing finite is left at a step: said, with a way to the last step that had something."""
    for one in lost:
        what = words.small(metric(name).title)
        st.caption(f"**{words.plain(one.name)}** has no finite {what} at step {words.step(step)}.")
        last = frames.last_finite(one.run, name, step)
        if last is not None:
            st.button(
                f"Go to step {words.step(last)}, the last at which all is finite",
                key=f"alive {name} {one.name}",
                icon=":material/history:",
                type="tertiary",
                on_click=lambda last=last: view.change(step=last),
            )


def _playback(shown: list[room.Shown], name: str, frame: pd.DataFrame, scale: str) -> draw.Frames:
    """The rows of a profile at every step of the page's player; a logarithmic chart drops rows that hold no value."""
    stops = frames.played(frames.stops([one.run for one in shown], [name]), len(frame))
    values = np.concatenate([frames.profile_frames(one.run, name, stops) for one in shown])
    if scale == "log":
        values = np.where(values > 0, values, np.nan)[(frame["value"] > 0).to_numpy()]
    return draw.Frames(stops, {"value": values})


def nearest(steps: dict[str, int], step: int) -> str:
    """ "Last recorded up to step 50: 40 in full." where a run has none at the chosen step, else nothing."""
    if all(found == step for found in steps.values()):
        return ""
    told = words.joined(f"{words.step(found)} in {name}" for name, found in steps.items())
    return f"Last recorded up to step {words.step(step)}: {told}."


def _domain(values: np.ndarray, name: str) -> tuple[float, float] | None:
    """What the colours span: logarithmic for sizes, from or around zero for shares.

    The outermost values are left to the ends, so that one spike does not flatten the rest.
    """
    values = values[np.isfinite(values)]
    if name == FINAL_SHARE:
        return cells.span(values, float(np.quantile(values, 0.995)) if len(values) else None)
    values = values[values > 0]
    if not len(values):
        return None
    low, high = (float(v) for v in np.quantile(values, [0.01, 0.995]))
    return (low, high) if low < high else (low / 2, high * 2)


def heatmaps(shown: Sequence[room.Shown], name: str) -> None:
    """One layer × step heatmap a run, all on one colour scale."""
    have = room.recorded(shown, name)
    grids = {one: frames.over_training(one.run, name) for one in have}
    grids = {one: grid for one, grid in grids.items() if len(grid)}
    if not grids:
        return
    values = np.concatenate([grid["value"].to_numpy(float) for grid in grids.values()])
    domain = _domain(values, name)
    pairs = list(grids.items())
    across = min(ACROSS, len(pairs))
    for start in range(0, len(pairs), across):
        for column, (one, grid) in zip(
            st.columns(across, gap="medium", vertical_alignment="bottom"),
            pairs[start : start + across],
            strict=False,
        ):
            with column:
                steps = reading.steps(one.run, name)
                first, last = (frames.profile(one.run, one.name, name, int(steps[end])) for end in (0, -1))
                chart = over_training(grid, name, findings.grid(first, last, one.name, name), domain)
                draw.show(chart, key=f"training {name} {one.name}", data=grid)
    longest = max(len(reading.steps(one.run, name)) for one in grids)
    if longest > frames.COLUMNS:
        st.caption(
            f"A cell is the mean of its steps, or the greatest of them where that is {frames.SPIKE:.0f} times as much."
        )
