"""The grid of a depth × step heatmap: cells and axes; colour and tooltip are the caller's."""

import altair as alt
import pandas as pd

from app.charts import axes, palette


def depth_by_step(
    frame: pd.DataFrame,
    name: str,
    title: str,
    height: int,
    colour: alt.Color,
    value: alt.Tooltip,
    fill: dict | None = None,
    **derived: str,
) -> alt.Chart:
    """Rows step, until, depth, place and value; `colour` has a domain; `derived` are Vega expressions."""
    first, last = (int(frame["depth"].min()), int(frame["depth"].max())) if len(frame) else (0, 1)
    span = [int(frame["step"].min()), int(frame["until"].max())] if len(frame) else [0, 1]
    painted = palette.painted(
        "value",
        colour["scale"].to_dict().get("type", "linear"),
        left=("step", 0),
        right=("until", 0),
        bottom=("depth", -0.5),
        top=("depth", 0.5),
        fill=fill,
    )
    return (
        alt.Chart(frame, title=axes.title(title), height=height, usermeta=painted)
        .transform_calculate(
            below="datum.depth - 0.5",
            above=f"datum.depth + 0.5 + {palette.under(last - first + 1)}",
            until=f"datum.until + {palette.under(frame['step'].nunique())} * (datum.until - datum.step)",
            **derived,
        )
        .mark_rect(strokeWidth=0, opacity=1, clip=True)
        .encode(
            x=alt.X("step:Q", axis=axes.steps(), scale=alt.Scale(domain=span, zero=False, nice=False)),
            x2=alt.X2("until:Q"),
            y=alt.Y(
                "below:Q",
                axis=axes.depth(name, last, count=8, **axes.FLAT),
                scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
            ),
            y2=alt.Y2("above:Q"),
            color=colour,
            tooltip=[
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
                value,
            ],
        )
    )
