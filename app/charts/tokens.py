"""A followed sequence: its text coloured by the weight of one read on one source, and that read's tokens × sources."""

import json

import altair as alt
import pandas as pd

from app.charts import axes, palette
from app.charts.triangle import short_source
from probes.vocabulary import TOKEN_WEIGHT

FONT = "Liberation Mono, DejaVu Sans Mono, Menlo, Consolas, monospace"
LINE = 29  # pixels of a line of text
_LARGEST = 21  # pixels of a character
_ACROSS = 0.605  # its width, in its size
_LEAST, _NARROW = 2, 64  # lines and characters, so that a short text is not stretched


def text(
    frame: pd.DataFrame, domain: tuple[float, float], title: str, chosen: int | None = None
) -> alt.LayerChart:
    """Rows token, told, shown, weight, line, start and end of app.token_reads.line; `chosen` is the token (from 1) to be
    framed."""
    lines = max(_LEAST, int(frame["line"].max()) + 1) if len(frame) else _LEAST
    columns = max(_NARROW, int(frame["end"].max())) if len(frame) else _NARROW
    most = round(columns * _LARGEST * _ACROSS)
    across = alt.Scale(
        domain=[0, columns], range=[0, alt.ExprRef(f"min(width, {most})")], nice=False, zero=False
    )
    down = alt.Scale(domain=[0, lines], nice=False, zero=False, reverse=True)
    size = f"min({_LARGEST}, width / {columns} / {_ACROSS})"
    ends = {
        "x": alt.X("start:Q", scale=across, axis=None),
        "x2": alt.X2("end:Q"),
        "y": alt.Y("top:Q", scale=down, axis=None),
        "y2": alt.Y2("bottom:Q"),
    }
    base = alt.Chart().transform_calculate(
        top="datum.line + 0.06", bottom="datum.line + 0.94", middle="datum.line + 0.5"
    )
    # Evenly spaced in the weight: here the question is which tokens stand apart.
    colour = alt.Color(
        "weight:Q",
        scale=alt.Scale(domain=list(domain), clamp=True, nice=False, zero=False),
        legend=palette.gradient_beside(lines * LINE - 20, domain),
    )
    tooltip = [
        alt.Tooltip("told:N", title="Token"),
        alt.Tooltip("token:Q", title="Position"),
        alt.Tooltip("weight:Q", title=TOKEN_WEIGHT.title, format=".3~g"),
    ]
    boxes = base.mark_rect(opacity=1).encode(**ends, color=colour, tooltip=tooltip)
    written = base.mark_text(
        align="left", baseline="middle", font=FONT, fontSize=alt.expr(size), tooltip=None
    ).encode(
        x=ends["x"],
        y=alt.Y("middle:Q", scale=down, axis=None),
        text=alt.Text("shown:N"),
        color=alt.condition(
            "luminance(scale('color', datum.weight)) > 0.3", alt.value("#101828"), alt.value("#ffffff")
        ),
        tooltip=tooltip,
    )
    framed = frame[frame["token"] == chosen][["line", "start", "end"]]
    frame_of = (
        alt.Chart(framed)
        .transform_calculate(top="datum.line + 0.02", bottom="datum.line + 0.98")
        .mark_rect(fillOpacity=0, stroke=palette.FOCUS, strokeWidth=2)
        .encode(**ends)
    )
    return alt.layer(boxes, written, frame_of, data=frame, title=axes.title(title), height=lines * LINE)


def grid(
    cells: pd.DataFrame,
    shown: list[str],
    domain: tuple[float, float],
    title: str,
    focus: tuple[int | None, int | None] = (None, None),
) -> alt.LayerChart:
    """Rows token, source, from, told, weight of app.token_reads.grid; `shown` are the tokens' texts in order; `focus`
    is the token (from 1) and the source (from 0) to be framed."""
    sources = dict(zip(cells["source"].astype(int), cells["from"].astype(str), strict=True))
    tokens = sorted(int(token) for token in cells["token"].unique())
    first, last = (tokens[0], tokens[-1]) if tokens else (1, 1)
    long = max(map(len, shown), default=1) > 2
    count = len(sources)
    every = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if count / step <= 13 or step == 100)
    labels = [source for source in sources if source == 0 or source % every == 0]
    height = max(150, min(460, 12 * count))
    names = json.dumps(dict(zip(map(str, tokens), shown, strict=False)), ensure_ascii=False)
    base = alt.Chart(cells).transform_calculate(
        left="datum.token - 0.5",
        right="datum.token + 0.5",
        below="datum.source - 0.5",
        above="datum.source + 0.5",
    )
    x = alt.X(
        "left:Q",
        scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
        axis=alt.Axis(
            title="Token",
            values=tokens,
            labelExpr=f"{names}[datum.value]",
            labelAngle=-90 if long else 0,
            labelAlign="right" if long else "center",
            labelBaseline="middle" if long else "top",
            labelFont=FONT,
            labelFontSize=alt.ExprRef(f"min(12, max(5, width / {len(tokens)} / {_ACROSS}))"),
            labelLimit=64,
            labelOverlap="greedy",
            labelSeparation=0,
            ticks=False,
            grid=False,
        ),
    )
    y = alt.Y(
        "below:Q",
        scale=alt.Scale(domain=[-0.5, count - 0.5], nice=False, zero=False),
        axis=alt.Axis(
            title="Source",
            values=labels,
            labelExpr=axes.lookup({i: short_source(sources[i]) for i in labels}, "''"),
            grid=False,
            labelOverlap=False,
            **axes.FLAT,
        ),
    )
    drawn = base.mark_rect(strokeWidth=0, opacity=1, clip=True).encode(
        x=x,
        x2=alt.X2("right:Q"),
        y=y,
        y2=alt.Y2("above:Q"),
        color=alt.Color(
            "weight:Q",
            scale=palette.shades(domain),
            legend=palette.gradient_beside(min(190, height - 20), domain),
        ),
        tooltip=[
            alt.Tooltip("told:N", title="Token"),
            alt.Tooltip("token:Q", title="Position"),
            alt.Tooltip("from:N", title="Source"),
            alt.Tooltip("weight:Q", title=TOKEN_WEIGHT.title, format=".3~g"),
        ],
    )
    token, source = focus
    outline = [
        (low - 0.5, high + 0.5, bottom - 0.5, top + 0.5)
        for wanted, low, high, bottom, top in (
            (token, token, token, 0, count - 1),
            (source, first, last, source, source),
        )
        if wanted is not None
    ]
    framed = (
        alt.Chart(pd.DataFrame(outline, columns=["left", "right", "below", "above"], dtype=float))
        .mark_rect(fillOpacity=0, stroke=palette.FOCUS, strokeWidth=2)
        .encode(x=x, x2=alt.X2("right:Q"), y=y, y2=alt.Y2("above:Q"))
    )
    painted = palette.painted(
        "weight",
        "sqrt",
        left=("token", -0.5),
        right=("token", 0.5),
        bottom=("source", -0.5),
        top=("source", 0.5),
    )
    return alt.layer(drawn, framed, title=axes.title(title), height=height, usermeta=painted)
