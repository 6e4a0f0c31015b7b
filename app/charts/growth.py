"""A metric against depth on two logarithmic axes, with the straight line whose slope is the growth exponent."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def growth(
    frame: pd.DataFrame,
    lines: pd.DataFrame,
    name: str,
    colours: dict[str, str],
    title: str,
    height: int = 300,
) -> alt.LayerChart:
    """Rows run, step, depth, place, value from depth 1; `lines` has run, depth, value, exponent, r2: two ends a run."""
    frame = frame[(frame["value"] > 0) & (frame["depth"] >= 1)]
    last = int(frame["depth"].max()) if len(frame) else 2
    ticks = [depth for depth in (1, 2, 5, 10, 20, 50, 100, 200, 400) if depth <= last]
    x = alt.X(
        "depth:Q",
        scale=alt.Scale(type="log", domain=[1, max(2, last)], nice=False, padding=8),
        axis=alt.Axis(title=axes.depth(name, None).title, values=ticks, format="d", grid=False),
    )
    values = pd.concat([frame["value"], lines["value"]])
    y = axes.value("value", axes.measure(name), values, "log")
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, opacity=0.9, size=34)
        .encode(
            x=x,
            y=y,
            color=palette.colour(colours),
            shape=palette.shape(colours),
            tooltip=[
                alt.Tooltip("run:N", title="Run"),
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("value:Q", title=axes.measure(name), format=".4~g"),
            ],
        )
    )
    fit = (
        alt.Chart(lines)
        .mark_line(strokeDash=[6, 4], strokeWidth=1.8)
        .encode(
            x=x,
            y=y,
            color=palette.colour(colours),
            tooltip=[
                alt.Tooltip("run:N", title="Run"),
                alt.Tooltip("exponent:Q", title="Growth exponent", format=".3f"),
                alt.Tooltip("r2:Q", title="R²", format=".2f"),
            ],
        )
    )
    return alt.layer(points, fit, title=axes.title(title), height=height)
