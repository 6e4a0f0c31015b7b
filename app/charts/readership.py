"""What each source gets from its readers, in even shares: nobody's columns are ballast, everybody's are sinks."""

import altair as alt
import pandas as pd

from app.charts import axes, palette

ROLES = {"sink": palette.FOCUS, "read": "#3580a5", "ballast": "#8c8c8c", "few readers": "#c4cad4"}
NAMES = {"sink": "Sink: everybody reads it", "ballast": "Ballast: nobody reads it"}


def readership(
    frame: pd.DataFrame, title: str, limits: tuple[float, float], height: int = 230
) -> alt.LayerChart:
    """Rows source, from, short, readers, least, mean, most, role of app.reads; `limits` are those of ballast and sink."""
    every = max(1, -(-len(frame) // 14))
    named = [short for i, short in enumerate(frame["short"]) if i % every == 0]
    shown = [role for role in ROLES if (frame["role"] == role).any()]
    top = max(2.0, float(frame["most"].max())) if len(frame) else 2.0
    low = min(0.0, float(frame["least"].min())) if len(frame) else 0.0
    scale = alt.Scale(domain=[low, top], nice=False)
    axis = alt.Axis(title="Weight, in even shares", tickCount=5, **axes.FLAT)
    base = alt.Chart(frame).encode(
        x=alt.X(
            "short:N",
            sort=list(frame["short"]),
            axis=alt.Axis(title="Source", values=named, labelAngle=0, labelOverlap=True, grid=False),
        ),
        color=alt.Color(
            "role:N",
            scale=alt.Scale(domain=shown, range=[ROLES[role] for role in shown]),
            legend=alt.Legend(title=None, orient="top", direction="horizontal", offset=24, symbolOpacity=1)
            if len(shown) > 1
            else None,
        ),
        tooltip=[
            alt.Tooltip("from:N", title="Source"),
            alt.Tooltip("mean:Q", title="Mean, in even shares", format=".2f"),
            alt.Tooltip("least:Q", title="Least", format=".2f"),
            alt.Tooltip("most:Q", title="Most", format=".2f"),
            alt.Tooltip("readers:Q", title="Readers", format="d"),
            alt.Tooltip("role:N", title="Role"),
        ],
    )
    limit = (
        alt.Chart(pd.DataFrame({"limit": [*limits, 1.0], "dash": ["limit", "limit", "even"]}))
        .mark_rule(strokeDash=[4, 4], strokeWidth=1)
        .encode(y=alt.Y("limit:Q", scale=scale, axis=axis))
    )
    wide = max(2, min(12, 260 // max(1, len(frame))))
    ranges = base.mark_bar(size=wide, opacity=0.45).encode(
        y=alt.Y("least:Q", scale=scale, axis=axis), y2=alt.Y2("most:Q")
    )
    means = base.mark_point(filled=True, opacity=1, size=40 if len(frame) <= 40 else 12).encode(
        y=alt.Y("mean:Q", scale=scale, axis=axis)
    )
    return alt.layer(ranges, means, limit, title=axes.title(title), height=height)
