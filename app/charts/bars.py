"""One read's weights over its sources, or one source's weights over its readers, as bars."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def bars(frame: pd.DataFrame, label: str, axis: str, title: str, height: int = 250) -> alt.LayerChart:
    """Rows place, short, value, spread (standard deviation over tokens, may be blank) and chosen, in order."""
    every = max(1, -(-len(frame) // (14 if len(frame) <= 40 else 8)))
    named = [short for i, short in enumerate(frame["short"]) if i % every == 0]
    base = alt.Chart().encode(
        x=alt.X(
            "short:N",
            sort=list(frame["short"]),
            axis=alt.Axis(title=axis, values=named, labelAngle=0, labelOverlap=True, grid=False),
        ),
        tooltip=[
            alt.Tooltip("place:N", title=axis.split(",")[0]),
            alt.Tooltip("value:Q", title=label, format=".3~g"),
            alt.Tooltip("spread:Q", title="Spread over tokens", format=".3~g"),
        ],
    )
    value = alt.Y("value:Q", axis=alt.Axis(title=label, tickCount=5, **axes.FLAT), scale=alt.Scale(zero=True))
    drawn = base.mark_bar(cornerRadiusEnd=2).encode(
        y=value, color=alt.condition("datum.chosen", alt.value(palette.FOCUS), alt.value("#3580a5"))
    )
    spread = (
        base.transform_filter("isValid(datum.spread)")
        .transform_calculate(low="max(0, datum.value - datum.spread)", high="datum.value + datum.spread")
        .mark_rule(strokeWidth=1.5 if len(frame) <= 40 else 0.6, opacity=1 if len(frame) <= 40 else 0.4)
        .encode(y=alt.Y("low:Q", axis=value["axis"], scale=value["scale"]), y2=alt.Y2("high:Q"))
    )
    return alt.layer(drawn, spread, data=frame, title=axes.title(title), height=height)
