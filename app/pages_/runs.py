"""Runs: which runs are here, and how do they learn?"""

import math

import pandas as pd
import streamlit as st

from app import draw, findings, frames, pick, reading, room, settings, table
from app.charts import axes, palette
from app.charts.lines import lines
from probes.vocabulary import metric

NOT_THE_COMPUTE_ADVANTAGE = (
    "An early loss gap between variants is not the paper’s 1.25×. That figure is a compute advantage at the "
    "end of training: AttnRes reaches the loss a baseline needs 1.25 times the compute for. A short run "
    "cannot show it."
)
ALONG = {"step": "Step", "tokens": "Tokens", "wall_time": "Wall time"}
SMOOTH = {"auto": "Automatic", "1": "None", "10": "10 points", "50": "50 points", "200": "200 points"}
SMOOTHING = (
    "A running mean, automatically of a fiftieth of the longest run's points; the band keeps the lowest and highest value of its "
    "window, so that a spike is not lost."
)
SCALES = {"linear": "Linear", "y": "Log y", "x": "Log x", "xy": "Log both"}


def body(shown: list[room.Shown]) -> None:
    picture = st.container()
    names = frames.scalars(one.run for one in shown)
    if names:
        scalar, along, smooth, scale = st.columns([2, 2, 2, 4], gap="medium")
        name = pick.one("scalar", "Scalar", {n: metric(n).title for n in names}, where=scalar)
        against = {
            x: title for x, title in ALONG.items() if x == "step" or any(x in one.run for one in shown)
        }
        x = pick.one("along", "Against", against, where=along)
        window = pick.one("smooth", "Smoothing", SMOOTH, where=smooth, help=SMOOTHING)
        axis = pick.choice("curve_scale", "Axes", SCALES, where=scale)
        with picture:
            _curves(shown, name, x, None if window == "auto" else int(window), axis)
    elif shown:
        picture.info("Nothing was logged yet: `recorder.log(loss=loss)` draws the loss here.")
    if len({one.attnres for one in shown}) == 2:
        st.info(NOT_THE_COMPUTE_ADVANTAGE, icon=":material/info:")
    table.show(shown)
    _settings(shown)
    room.explain(names or ["loss"])


def _curves(shown: list[room.Shown], name: str, x: str, window: int | None, axis: str) -> None:
    have = room.recorded(shown, name)
    if x != "step":
        have = room.recorded(have, x)
    if window is None:
        window = frames.smoothing((one.run for one in have), name)
    key, zoom = f"runs {name}", None
    binned = x == "step" and any(len(reading.steps(one.run, name)) > frames.POINTS for one in have)
    if binned and (seen := st.session_state.get(f"zoomed {key}")):
        zoom = math.floor(seen["first"]), math.ceil(seen["last"])
    parts = [frames.scalar(one.run, one.name, name, x, window, zoom=zoom) for one in have]
    if not parts:
        return
    frame = pd.concat(parts, ignore_index=True)
    # The title tells of what was recorded, not of averages on the way to the screen.
    title = findings.losses(frames.latest({one.name: one.run for one in have}, name, x), name)
    y_scale, x_scale = ("log" if side in axis else "linear" for side in ("y", "x"))
    chart = lines(
        frame,
        "value",
        axes.measure(name),
        room.colours(have),
        title,
        y_scale,
        x=x,
        x_scale=x_scale,
        fill=palette.filling(500, 260, 440),
    )
    # Fewer points than there is room for are all on the screen already.
    on_zoom = (lambda seen: _zoomed(f"zoomed {key}", seen)) if binned else None
    draw.show(chart, key=key, data=frame, on_zoom=on_zoom)
    told = "Ctrl and the mouse wheel zoom, dragging moves, a double click shows all again."
    if binned:
        told += (
            " A point stands for as many steps as there is room for: the band keeps their extremes, and zooming in shows "
            "more of them."
        )
    st.caption(told)


def _zoomed(key: str, seen: dict) -> None:
    """Keep the steps in sight for the next drawing."""
    ends = [seen.get(end) for end in ("first", "last")]
    sound = all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
    st.session_state[key] = seen if sound and ends[0] < ends[1] else None


def _settings(shown: list[room.Shown]) -> None:
    """The configuration of the chosen runs: where they differ, or all of it."""
    if not shown:
        return
    st.subheader("Configuration of the chosen runs", anchor=False)
    which = "all"
    if len(shown) > 1:
        which = pick.choice("settings", "Entries", {"differing": "Where they differ", "all": "All"})
    rows = settings.together([one.run.config for one in shown], which == "differing")
    if rows:
        entries = pd.DataFrame.from_dict(rows, orient="index", columns=[one.name for one in shown])
        st.dataframe(entries.rename_axis("Entry"), width="stretch")
    elif len(shown) == 1:
        st.caption("None was recorded: `probes.record(…, config={…})` keeps it.")
    else:
        st.caption("They do not differ in any entry.")


room.enter(
    "How do these runs learn?",
    "The training loss of the chosen runs, and every run in the folder.",
    body,
    True,
)
