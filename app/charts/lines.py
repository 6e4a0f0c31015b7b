"""A scalar against the step: one line per run, a band from minimum to maximum where points were averaged."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def lines(
    frame: pd.DataFrame,
    column: str,
    label: str,
    colours: dict[str, str],
    title: str,
    scale: str = "linear",
    zero: bool = False,
    height: int = 300,
) -> alt.Chart:
    """Rows run, step, `column` and, for bands, low and high. `label` is the axis title with its unit."""
    if scale == "log":
        frame = frame[frame[column] > 0]
    how = alt.Scale(type="log", nice=True) if scale == "log" else alt.Scale(zero=zero, nice=True)
    x = alt.X("step:Q", axis=axes.steps(), scale=alt.Scale(nice=False))
    y = alt.Y(f"{column}:Q", title=label, scale=how)
    tooltip = [
        alt.Tooltip("run:N", title="Run"),
        alt.Tooltip("step:Q", title="Step", format=",d"),
        alt.Tooltip(f"{column}:Q", title=label, format=".4~g"),
    ]
    few = frame.groupby("run").size().max() if len(frame) else 0
    base = alt.Chart(frame).encode(x=x, color=palette.colour(colours))
    layers = []
    if "low" in frame and (frame["low"] < frame["high"]).any():
        layers.append(
            base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", scale=how, title=label), y2="high:Q")
        )
    layers.append(base.mark_line(strokeWidth=1.8).encode(y=y))
    dots = base.mark_point(filled=True, size=40 if few <= 40 else 30, opacity=1 if few <= 40 else 0)
    layers.append(dots.encode(y=y, shape=palette.shape(colours), tooltip=tooltip))
    return alt.layer(*layers).properties(title=axes.title(title), height=height)
