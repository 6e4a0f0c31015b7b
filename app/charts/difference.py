"""What two runs differ by: heatmaps on a diverging scale with zero in its middle."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.grid import depth_by_step
from app.charts.triangle import triangle

FACTORS = "format(pow(2, abs(datum.value)), '.2~g') + '×' + (datum.value < 0 ? ' less' : datum.value > 0 ? ' more' : '')"


def over_training(frame: pd.DataFrame, name: str, second: str, title: str, height: int = 370) -> alt.Chart:
    """Rows step, until, depth, place, value (log2 of a ratio)."""
    shade = colour("value", frame["value"], f"{axes.measure(name)} in {second}", FACTORS)
    value = alt.Tooltip("factor:N", title=f"In {second}")
    return depth_by_step(frame, name, title, height, shade, value, factor=FACTORS)


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
