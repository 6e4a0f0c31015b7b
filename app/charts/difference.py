"""What two runs differ by: heatmaps on a diverging scale with zero in its middle."""

import altair as alt
import pandas as pd

from app import words
from app.charts import palette
from app.charts.grid import depth_by_step
from app.charts.triangle import triangle

# Below a tenth, percents say more than a factor.
FACTORS = (
    "datum.value === 0 ? 'same' : abs(datum.value) < 0.137 ? format(100 * (pow(2, abs(datum.value)) - 1), '.2~g') + '%' + (SIGN) : "
    "format(pow(2, abs(datum.value)), abs(datum.value) > 3.3 ? ',.0f' : '.2~g') + '×' + (SIGN)"
).replace("SIGN", "datum.value < 0 ? ' less' : datum.value > 0 ? ' more' : ''")


def over_training(
    frame: pd.DataFrame, name: str, second: str, title: str, height: int = 370, fill: dict | None = None
) -> alt.Chart:
    """Rows step, until, depth, place, value (log2 of a ratio); `second` says of what: "In full", "Against step 0"."""
    known = frame["value"].abs().dropna()
    # The outermost percent is left to the ends.
    top = float(known.quantile(0.99)) if len(known) else 1.0
    top = top if top > 0 else 1.0
    # Beside the plot, so that it stands as high as the profile beside it.
    legend = alt.Legend(
        title=None,
        orient="right",
        gradientLength=190,
        gradientThickness=8,
        labelExpr=FACTORS,
        values=[-top, -top / 2, 0, top / 2, top],
        offset=14,
    )
    shade = alt.Color("value:Q", scale=palette.shades((-top, top)), legend=legend)
    value = alt.Tooltip("factor:N", title=second)
    return depth_by_step(frame, name, title, height, shade, value, fill, factor=FACTORS)


def weights(cells: pd.DataFrame, labels: tuple[str, str], legend: str, title: str) -> alt.LayerChart:
    """Rows of app.difference.cells: the triangle of differences; `labels` say of what, as "in full" and "in block"."""
    known = cells["difference"].abs().dropna()
    top = float(known.quantile(0.995)) if len(known) else 1.0
    told = {"first": labels[0], "second": labels[1], "difference": "difference"}
    told = {column: words.capital(label) for column, label in told.items()}
    domain = (-top, top) if top > 0 else (-1, 1)
    return triangle(
        cells, "difference", title, domain, height=500, legend=f"More or less {legend}", told=told
    )
