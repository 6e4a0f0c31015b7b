"""A metric against depth: one line per run, shapes and colours by run."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def profile(
    frame: pd.DataFrame,
    name: str,
    colours: dict[str, str],
    title: str,
    scale: str = "linear",
    height: int = 340,
    relative: bool = False,
    label: str = "",
    fill: dict | None = None,
) -> alt.LayerChart:
    """Rows run, step, depth, place, value; with `relative`, depth runs from 0 to 1. `label` replaces the metric's.
    `fill` as of app.charts.palette.filling: the height that the window leaves."""
    label = label or axes.measure(name)
    if scale == "log":
        frame = frame[frame["value"] > 0]
    lasts = frame.groupby("run")["depth"].max().unique()
    last = int(lasts[0]) if len(lasts) == 1 else None
    first, most = (int(frame["depth"].min()), int(max(lasts))) if len(frame) else (0, 1)
    axis = alt.Axis(title="Relative depth", grid=False) if relative else axes.depth(name, last)
    base = alt.Chart().encode(
        x=alt.X(
            "depth:Q",
            scale=alt.Scale(domain=[first, most], nice=False, zero=False, padding=8),
            axis=axis,
        ),
        y=axes.value("value", label, frame["value"], scale),
        color=palette.colour(colours),
        order=alt.Order("depth:Q"),
    )
    lines = base.mark_line(strokeWidth=2 if most <= 64 else 1.6)
    size = 34 if most <= 32 else 14 if most <= 80 else 6
    points = base.mark_point(filled=True, opacity=1, size=size).encode(
        shape=palette.shape(colours),
        tooltip=[
            alt.Tooltip("run:N", title="Run"),
            alt.Tooltip("place:N", title="Where"),
            alt.Tooltip("value:Q", title=label, format=".4~g"),
            alt.Tooltip("step:Q", title="Step", format=",d"),
        ],
    )
    return alt.layer(
        lines,
        points,
        data=frame,
        title=axes.title(title),
        height=height,
        usermeta=fill or alt.Undefined,
    )
