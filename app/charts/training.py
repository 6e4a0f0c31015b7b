"""A metric over training: a layer × step heatmap of one run."""

import altair as alt
import pandas as pd

from app.charts import axes


def over_training(
    frame: pd.DataFrame, name: str, title: str, domain: tuple[float, float] | None = None, scale: str = "log"
) -> alt.Chart:
    """Rows step, until, depth, value, place. `domain` makes several runs share one colour scale."""
    if scale == "log":
        frame = frame[frame["value"] > 0]
    first, last = (int(frame["depth"].min()), int(frame["depth"].max())) if len(frame) else (0, 1)
    how = alt.Scale(type=scale, domain=list(domain) if domain else alt.Undefined, nice=False, clamp=True)
    return (
        alt.Chart(frame)
        .transform_calculate(below="datum.depth - 0.5", above="datum.depth + 0.5")
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("step:Q", axis=axes.steps(), scale=alt.Scale(zero=False, nice=False)),
            x2="until:Q",
            y=alt.Y(
                "below:Q",
                axis=axes.depth(name, last, grid=False),
                scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
            ),
            y2="above:Q",
            color=alt.Color(
                "value:Q",
                scale=how,
                legend=alt.Legend(
                    title=axes.measure(name), titleLimit=0, orient="bottom", direction="horizontal", gradientLength=220,
                    gradientThickness=10, format=".2~g", tickCount=5, titleOrient="left", titleAnchor="middle",
                ),
            ),
            tooltip=[
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
                alt.Tooltip("value:Q", title=axes.measure(name), format=".4~g"),
            ],
        )
        .properties(title=axes.title(title), height=300, usermeta={"embedOptions": {"renderer": "canvas"}})
    )  # fmt: skip
