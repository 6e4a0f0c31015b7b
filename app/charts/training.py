"""A metric over training: a layer × step heatmap of one run."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.grid import depth_by_step


def over_training(
    frame: pd.DataFrame, name: str, title: str, domain: tuple[float, float] | None = None, height: int = 370
) -> alt.Chart:
    """Rows step, until, depth, value, place. Colour is logarithmic; `domain` lets several runs share it."""
    frame = frame[frame["value"] > 0]
    scale = alt.Scale(type="log", domain=list(domain) if domain else alt.Undefined, nice=False, clamp=True)
    colour = alt.Color("value:Q", scale=scale, legend=palette.gradient(axes.measure(name), domain))
    value = alt.Tooltip("value:Q", title=axes.measure(name), format=".4~g")
    return depth_by_step(frame, name, title, height, colour, value)
