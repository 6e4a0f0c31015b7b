"""A metric over training: a layer × step heatmap of one run."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def over_training(
    frame: pd.DataFrame, name: str, title: str, domain: tuple[float, float] | None = None, height: int = 370
) -> alt.Chart:
    """Rows step, until, depth, value, place. Colour is logarithmic; `domain` lets several runs share it."""
    frame = frame[frame["value"] > 0]
    first, last = (int(frame["depth"].min()), int(frame["depth"].max())) if len(frame) else (0, 1)
    span = [int(frame["step"].min()), int(frame["until"].max())] if len(frame) else [0, 1]
    scale = alt.Scale(type="log", domain=list(domain) if domain else alt.Undefined, nice=False, clamp=True)
    return (
        alt.Chart(frame)
        .transform_calculate(
            below="datum.depth - 0.5",
            above=f"datum.depth + 0.5 + {palette.under(last - first + 1)}",
            until=f"datum.until + {palette.under(frame['step'].nunique())} * (datum.until - datum.step)",
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
            color=alt.Color("value:Q", scale=scale, legend=palette.gradient(axes.measure(name), domain)),
            tooltip=[
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
                alt.Tooltip("value:Q", title=axes.measure(name), format=".4~g"),
            ],
        )
        .properties(title=axes.title(title), height=height, usermeta=palette.CANVAS)
    )
