"""Who gets how many tokens: a layer × expert heatmap of one run at one step."""

import altair as alt
import pandas as pd

from app.charts import axes, palette

_NAME = "expert_load"


def layer_by_expert(frame: pd.DataFrame, title: str, height: int = 370) -> alt.Chart:
    """Rows step, depth, place, expert, value, even; layers without experts stay blank."""
    last, most = int(frame["depth"].max()), int(frame["expert"].max())
    painted = palette.painted(
        "value",
        "sqrt",
        left=("expert", -0.5),
        right=("expert", 0.5),
        bottom=("depth", -0.5),
        top=("depth", 0.5),
    )
    domain = 0.0, float(frame["value"].max()) or 1.0
    return (
        alt.Chart(frame)
        .transform_calculate(
            left="datum.expert - 0.5",
            right="datum.expert + 0.5",
            below="datum.depth - 0.5",
            above="datum.depth + 0.5",
        )
        .mark_rect(strokeWidth=0, opacity=1, clip=True)
        .encode(
            x=alt.X(
                "left:Q",
                axis=alt.Axis(title="Expert", values=axes.ticks(1, most), format="d", grid=False),
                scale=alt.Scale(domain=[0.5, most + 0.5], nice=False, zero=False),
            ),
            x2="right:Q",
            y=alt.Y(
                "below:Q",
                axis=axes.depth("expert_balance", last, count=8, **axes.FLAT),
                scale=alt.Scale(domain=[0.5, last + 0.5], nice=False, zero=False),
            ),
            y2="above:Q",
            color=alt.Color(
                "value:Q", scale=palette.shades(domain), legend=palette.gradient(axes.measure(_NAME))
            ),
            tooltip=[
                alt.Tooltip("place:N", title="Where"),
                alt.Tooltip("expert:Q", title="Expert", format="d"),
                alt.Tooltip("value:Q", title=axes.measure(_NAME), format=".3~g"),
                alt.Tooltip("even:Q", title="Even share", format=".3~g"),
                alt.Tooltip("step:Q", title="Step", format=",d"),
            ],
        )
        .properties(title=axes.title(title), height=height, usermeta=painted)
    )
