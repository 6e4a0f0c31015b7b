"""A scalar against the step: one line per run, a band from minimum to maximum where points were averaged."""

import altair as alt
import pandas as pd

from app.charts import axes, palette

FEW = 40  # up to this many points a line shows each


def lines(
    frame: pd.DataFrame,
    column: str,
    label: str,
    colours: dict[str, str],
    title: str,
    scale: str = "linear",
    zero: bool = False,
    height: int = 340,
    x: str = "step",
    x_scale: str = "linear",
    fill: dict | None = None,
) -> alt.LayerChart:
    """Rows run, step, `column` and, for bands, low and high. `label` is the axis title with its unit.

    `fill` as of app.charts.palette.filling: the height that the window leaves. `x` "tokens" or "wall_time" draws against the column x, which holds that. No line joins rows of different `segment`.
    """
    if scale == "log":
        frame = frame[frame[column] > 0]
        if "low" in frame:
            frame = frame.assign(low=frame["low"].where(frame["low"] > 0, frame[column]))
    along = "step" if x == "step" else "x"
    if x_scale == "log":
        frame = frame[frame[along] > 0]
    if "segment" in frame:
        # A point between two gaps has no line to be seen by.
        frame = frame.assign(alone=frame.groupby(["run", "segment"])[column].transform("count") == 1)
    y = axes.value(column, label, frame[column], scale, zero)
    base = alt.Chart().encode(
        x=axes.along(along, x, frame[along], x_scale),
        color=palette.colour(colours, symbol="stroke"),
        detail=alt.Detail("segment:N") if "segment" in frame else alt.Undefined,
    )
    layers = []
    if "low" in frame:  # also where nothing is averaged yet: a layer that comes later would be another chart
        low = alt.Y("low:Q", scale=y["scale"], axis=y["axis"])
        layers.append(base.mark_area(opacity=0.13).encode(y=low, y2=alt.Y2("high:Q")))
    layers.append(base.mark_line(strokeWidth=1.8).encode(y=y))
    few = frame.groupby("run").size().max() <= FEW if len(frame) else True
    # Invisible points carry the tooltip where visible ones would blur the line. A value, not another chart: a run
    # that grows past the limit keeps its picture.
    seen = alt.param(name="seen", value=1 if few else 0)
    zoom = alt.selection_interval(name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]")
    # Altair numbers views without a name anew each time.
    points = (
        base.add_params(zoom, seen)
        .mark_circle(size=40, opacity=alt.expr(f"{seen.name} || datum.alone ? 1 : 0"))
        .encode(
            y=y,
            tooltip=[
                alt.Tooltip("run:N", title="Run"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
                alt.Tooltip(f"{column}:Q", title=label, format=".4~g"),
                *(
                    alt.Tooltip(f"{end}:Q", title=told, format=".4~g")
                    for end, told in (("low", "Lowest here"), ("high", "Highest here"))
                    if end in frame
                ),
            ],
        )
    )
    points.name = "points"
    return alt.layer(
        *layers,
        points,
        data=frame,
        title=axes.title(title),
        height=height,
        usermeta=fill or alt.Undefined,
    )
