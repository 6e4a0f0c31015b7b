"""Runs: which runs are here, and how do they learn?"""

import time

import pandas as pd
import streamlit as st

from app import draw, findings, frames, opener, pick, room, view, words
from app.charts import axes
from app.charts.lines import lines
from probes.vocabulary import metric

NOT_THE_COMPUTE_ADVANTAGE = (
    "An early loss gap between variants is not the paper’s 1.25×. That figure is a compute advantage at the "
    "end of training: AttnRes reaches the loss a baseline needs 1.25 times the compute for. A short run "
    "cannot show it."
)
ALONG = {"step": "Step", "tokens": "Tokens", "wall_time": "Wall time"}
SMOOTH = {"1": "None", "10": "10 points", "50": "50 points", "200": "200 points"}
SMOOTHING = (
    "A running mean; the band keeps the lowest and highest value of its window, so that a spike is not lost."
)
SCALES = {"linear": "Linear", "y": "Log y", "x": "Log x", "xy": "Log both"}


def body(shown: list[room.Shown]) -> None:
    picture = st.container()
    names = frames.scalars(one.run for one in shown)
    if names:
        scalar, along, smooth, scale = st.columns([2, 2, 2, 3], gap="medium")
        name = pick.one("scalar", "Scalar", {n: metric(n).title for n in names}, where=scalar)
        against = {
            x: title for x, title in ALONG.items() if x == "step" or any(x in one.run for one in shown)
        }
        x = pick.one("along", "Against", against, where=along)
        window = pick.one("smooth", "Smoothing", SMOOTH, where=smooth, help=SMOOTHING)
        axis = pick.choice("curve_scale", "Axes", SCALES, where=scale)
        with picture:
            _curves(shown, name, x, int(window), axis)
    elif shown:
        picture.info("Nothing was logged yet: `recorder.log(loss=loss)` draws the loss here.")
    if len({one.attnres for one in shown}) == 2:
        st.info(NOT_THE_COMPUTE_ADVANTAGE, icon=":material/info:")
    st.subheader("All runs here", anchor=False)
    st.dataframe(_table(), hide_index=True, width="stretch")
    differing = _differing(shown)
    if len(differing):
        st.subheader("Where the chosen runs differ", anchor=False)
        st.dataframe(differing, width="stretch")
    room.explain(names or ["loss"])


def _curves(shown: list[room.Shown], name: str, x: str, window: int, axis: str) -> None:
    have = room.recorded(shown, name)
    if x != "step":
        have = room.recorded(have, x)
    parts = [frames.scalar(one.run, one.name, name, x, window) for one in have]
    if not parts:
        return
    frame = pd.concat(parts, ignore_index=True)
    title = findings.losses(frame, name)
    y_scale, x_scale = ("log" if side in axis else "linear" for side in ("y", "x"))
    chart = lines(
        frame,
        "value",
        axes.measure(name),
        room.colours(have),
        title,
        y_scale,
        height=380,
        x=x,
        x_scale=x_scale,
    )
    draw.show(chart, key=f"runs {name}", data=frame)
    st.caption("Ctrl and the mouse wheel zoom, dragging moves, a double click shows all again.")


def _table() -> pd.DataFrame:
    """One row a run, newest first."""
    rows = []
    kept, _ = pick.matching([entry.name for entry in room.entries()], view.current().search)
    for entry in reversed(room.entries()):
        if entry.problem or entry.name not in kept:
            continue
        run = opener.opened(entry)
        loss = frames.series(run, "loss")[1]
        config = run.config
        rows.append(
            {
                "Run": entry.name,
                "Status": run.status,
                "Residual": str(config.get("residual", "–")),
                "Layers": len(run.layers),
                "Width": str(config.get("width", "–")),
                "Last step": words.step(run.last_step) if run.last_step >= 0 else "–",
                "Loss (last logged)": words.number(float(loss[-1])) if len(loss) else "–",
                "Started": f"{run.created:%Y-%m-%d %H:%M} UTC",
                "Age": words.age(time.time() - run.created.timestamp()),
                "Size": words.size(run.size),
                "Tags": ", ".join(run.tags),
            }
        )
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    return table if table["Tags"].any() else table.drop(columns="Tags")


def _differing(shown: list[room.Shown]) -> pd.DataFrame:
    """Configuration entries that are not the same in every chosen run: one row each, one column a run."""
    if len(shown) < 2:
        return pd.DataFrame()
    keys = dict.fromkeys(key for one in shown for key in one.run.config)
    table = {key: [str(one.run.config.get(key, "–")) for one in shown] for key in keys}
    table = {key: values for key, values in table.items() if len(set(values)) > 1}
    return pd.DataFrame.from_dict(table, orient="index", columns=[one.name for one in shown])


room.enter(
    "How do these runs learn?",
    "The training loss of the chosen runs, and every run in the folder.",
    body,
    True,
)
