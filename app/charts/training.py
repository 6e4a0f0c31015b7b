"""A metric over training: a layer × step heatmap of one run."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.grid import depth_by_step


def over_training(
    frame: pd.DataFrame, name: str, title: str, domain: tuple[float, float] | None = None, height: int = 370
) -> alt.Chart:
    """Rows step, until, depth, value, place; `domain` lets several runs share its colours.

    Colour is logarithmic, and cells of zero stay blank, unless the domain begins at zero or below it.
    """
    if domain is None or domain[0] > 0:
        frame = frame[frame["value"] > 0]
    if domain is None:
        low, high = (float(frame["value"].min()), float(frame["value"].max())) if len(frame) else (0.1, 1.0)
        domain = (low, high) if low < high else (low / 2, low * 2)
    legend = palette.gradient(axes.measure(name), domain if domain[0] > 0 else None)
    colour = alt.Color("value:Q", scale=palette.shades(domain), legend=legend)
    value = alt.Tooltip("value:Q", title=axes.measure(name), format=".4~g")
    return depth_by_step(frame, name, title, height, colour, value)
