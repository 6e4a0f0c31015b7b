"""What two runs differ by: heatmaps on a diverging scale with zero in its middle."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.triangle import triangle

FACTORS = "format(pow(2, abs(datum.value)), '.2~g') + '×' + (datum.value < 0 ? ' less' : datum.value > 0 ? ' more' : '')"


def over_training(frame: pd.DataFrame, name: str, second: str, title: str, height: int = 370) -> alt.Chart:
    """Rows step, until, depth, place, value (log2 of a ratio)."""
    first, last = (int(frame["depth"].min()), int(frame["depth"].max())) if len(frame) else (0, 1)
    span = [int(frame["step"].min()), int(frame["until"].max())] if len(frame) else [0, 1]
    return (
        alt.Chart(frame)
        .transform_calculate(
            below="datum.depth - 0.5",
            above=f"datum.depth + 0.5 + {palette.under(last - first + 1)}",
            until=f"datum.until + {palette.under(frame['step'].nunique())} * (datum.until - datum.step)",
            factor=FACTORS,
        )
        .mark_rect(strokeWidth=0, opacity=1, clip=True)
        .encode(
            x=alt.X("step:Q", axis=axes.steps(), scale=alt.Scale(domain=span, zero=False, nice=False)),
            x2="until:Q",
            y=alt.Y(
                "below:Q",
                axis=axes.depth(name, last, count=8, **axes.FLAT),
                scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
            ),
            y2="above:Q",
            color=colour("value", frame["value"], f"{axes.measure(name)} in {second}", FACTORS),
            tooltip=[
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
                alt.Tooltip("factor:N", title=f"In {second}"),
            ],
        )
        .properties(title=axes.title(title), height=height, usermeta=palette.CANVAS)
    )


def weights(cells: pd.DataFrame, second: str, title: str, height: int = 500) -> alt.LayerChart:
    """Rows of app.difference.cells: the triangle of differences."""
    chart = triangle(
        cells.assign(depth_weight=cells["difference"]), "depth_weight", title, (0, 1), height=height
    )
    label = f"Depth weight, more or less in {second}"
    chart.layer[0].encoding.color = colour("depth_weight", cells["difference"], label, alt.Undefined)
    return chart


def colour(field: str, values: pd.Series, title: str, label) -> alt.Color:
    """Zero in the middle, both ends equally far; the outermost percent is left to the ends."""
    known = values.abs().dropna()
    top = float(known.quantile(0.99)) if len(known) else 1.0
    top = top if top > 0 else 1.0
    legend = palette.gradient(title)
    legend.labelExpr = label
    legend.values = [-top, -top / 2, 0, top / 2, top] if label is not alt.Undefined else alt.Undefined
    return alt.Color(
        f"{field}:Q",
        scale=alt.Scale(domain=[-top, top], domainMid=0, range="diverging", clamp=True, nice=False),
        legend=legend,
    )
