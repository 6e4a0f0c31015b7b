"""Layers by what is lost without them, beside their share of the final state; and curves of what-ifs."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.causes import KINDS, NAMES

COLOURS = {
    "by attribution": palette.RUNS[1],
    "by share": palette.RUNS[2],
    "by weight": palette.RUNS[0],
    "at random": palette.RUNS[6],
}
DASHES = {"by attribution": [1, 0], "by share": [6, 3], "by weight": [2, 2], "at random": [1, 3]}


def ranked(
    frame: pd.DataFrame, column: str, label: str, order: list[str], title: str, error: str = ""
) -> alt.LayerChart:
    """Rows place, kind and `column`: a bar a layer in the given order of places; `error` is a column of standard errors."""
    shown = [kind for kind in KINDS if (frame["kind"] == kind).any()]
    names = "datum.label"
    for kind in shown:
        names = f"datum.label === {kind!r} ? {NAMES[kind]!r} : {names}"
    x = axes.signed(column, label, frame[column].dropna(), alt.X, orient="top")
    y = alt.Y(
        "place:N",
        sort=order,
        axis=alt.Axis(
            title=None, labelLimit=130, labelFontSize=10, labelOverlap=True, ticks=False, grid=False
        ),
    )
    tips = [alt.Tooltip("place:N", title="Layer"), alt.Tooltip(f"{column}:Q", title=label, format="+.3~g")]
    if error:
        frame = frame.assign(
            low=frame[column] - 2 * frame[error],
            high=frame[column] + 2 * frame[error],
            reach=2 * frame[error],
        )
        tips += [
            alt.Tooltip("reach:Q", title="Two standard errors", format=".2~g"),
            alt.Tooltip("spread:Q", title="Standard deviation over sequences", format=".2~g"),
            alt.Tooltip("tokens:Q", title="Standard deviation over tokens", format=".2~g"),
        ]
    base = alt.Chart(frame.dropna(subset=[column])).encode(y=y, tooltip=tips)
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        x=x,
        color=alt.Color(
            "kind:N",
            scale=alt.Scale(domain=shown, range=[KINDS[kind] for kind in shown]),
            legend=alt.Legend(title=None, orient="top", direction="horizontal", labelExpr=names, offset=6)
            if len(shown) > 1
            else None,
        ),
    )
    layers = [bars]
    if error:
        layers.append(
            base.mark_rule(strokeWidth=1.2).encode(
                x=alt.X("low:Q", axis=x["axis"], scale=x["scale"]), x2="high:Q"
            )
        )
    return alt.layer(*layers).properties(title=axes.title(title), height=max(150, 15 * len(order)))


def removal(frame: pd.DataFrame, kind: str, label: str, title: str, height: int = 300) -> alt.LayerChart:
    """Rows ranking ("by weight" …), count, share (of all that can go), value, low, high: the target as the least important
    are removed."""
    shown = [name for name in COLOURS if (frame["ranking"] == name).any()]
    base = alt.Chart(frame).encode(
        x=alt.X(
            "count:Q",
            axis=alt.Axis(
                title=f"{kind.capitalize()} removed, the least important first", grid=False, tickMinStep=1
            ),
        ),
        color=alt.Color(
            "ranking:N",
            sort=shown,
            scale=alt.Scale(domain=shown, range=[COLOURS[name] for name in shown]),
            legend=alt.Legend(
                title=None,
                orient="top",
                direction="horizontal",
                symbolType="stroke",
                symbolOpacity=1,
                symbolStrokeWidth=3,
                offset=28,
            ),
        ),
    )
    axis = alt.Axis(title=label, tickCount=6, **axes.FLAT)
    y = alt.Y("value:Q", axis=axis, scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.13).encode(
        y=alt.Y("low:Q", axis=axis, scale=alt.Scale(zero=False)), y2="high:Q"
    )
    lines = base.mark_line(strokeWidth=2).encode(
        y=y,
        strokeDash=alt.StrokeDash(
            "ranking:N",
            sort=shown,
            scale=alt.Scale(domain=shown, range=[DASHES[name] for name in shown]),
            legend=None,
        ),
    )
    points = base.mark_circle(size=22, opacity=1).encode(
        y=y,
        tooltip=[
            alt.Tooltip("ranking:N", title="Removed"),
            alt.Tooltip("count:Q", title=f"{kind.capitalize()} removed", format=",d"),
            alt.Tooltip("share:Q", title="Of all", format=".0%"),
            alt.Tooltip("value:Q", title=label, format=".4~g"),
        ],
    )
    return alt.layer(band, lines, points).properties(title=axes.title(title), height=height)
