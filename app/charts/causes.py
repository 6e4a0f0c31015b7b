"""Weight and attribution: of one read side by side, of all reads against each other, and how far they agree."""

import altair as alt
import numpy as np
import pandas as pd

from app.charts import axes, palette

PAIR = {"Weight": palette.RUNS[0], "Attribution": palette.RUNS[1]}
KINDS = {
    "attention": palette.RUNS[0],
    "mlp": palette.RUNS[2],
    "layer": palette.RUNS[2],
    "final": palette.RUNS[3],
}
NAMES = {"attention": "Attention", "mlp": "MLP", "layer": "Layer", "final": "Final read"}


def paired(frame: pd.DataFrame, unit: str, title: str, height: int = 260) -> alt.LayerChart:
    """Rows from, short, weight, value, error (may be blank) of one read, in order: two bars a source, each relative to the
    read's largest, so that both have one axis."""
    parts = []
    for name, column in (("Weight", "weight"), ("Attribution", "value")):
        most = frame[column].abs().max()
        if name == "Weight" and pd.isna(most):
            continue  # of a plain sum there are none to show
        scale = 1 / most if most and most > 0 else 0.0
        error = 2 * frame["error"] * scale if name == "Attribution" else float("nan")
        parts.append(frame.assign(what=name, relative=frame[column] * scale, reach=error))
    both = pd.concat(parts, ignore_index=True)
    shown = list(both["what"].unique())
    both = both.assign(low=both["relative"] - both["reach"], high=both["relative"] + both["reach"])
    every = max(1, -(-len(frame) // 14))
    named = [short for i, short in enumerate(frame["short"]) if i % every == 0]
    base = alt.Chart(both).encode(
        x=alt.X(
            "short:N",
            sort=list(frame["short"]),
            axis=alt.Axis(title="Source", values=named, labelAngle=0, labelOverlap=True, grid=False),
        ),
        xOffset=alt.XOffset("what:N", sort=list(PAIR)),
        tooltip=[
            alt.Tooltip("from:N", title="Source"),
            alt.Tooltip("weight:Q", title="Weight (share of the read)", format=".3~g"),
            alt.Tooltip("value:Q", title=f"Attribution ({unit})", format="+.3~g"),
            alt.Tooltip("error:Q", title="Standard error of the attribution", format=".2~g"),
        ],
    )
    axis = alt.Axis(title="Relative to the read’s largest", tickCount=5, **axes.FLAT)
    scale = alt.Scale(domain=[min(0.0, float(both["relative"].min(skipna=True) or 0)) * 1.1, 1.1], clamp=True)
    drawn = base.mark_bar(cornerRadiusEnd=2).encode(
        y=alt.Y("relative:Q", axis=axis, scale=scale),
        color=alt.Color(
            "what:N",
            sort=list(PAIR),
            scale=alt.Scale(domain=shown, range=[PAIR[name] for name in shown]),
            legend=alt.Legend(title=None, orient="top", direction="horizontal", offset=28),
        ),
    )
    reach = (
        base.transform_filter("isValid(datum.reach)")
        .mark_rule(strokeWidth=1.2)
        .encode(y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q")
    )
    return alt.layer(drawn, reach).properties(title=axes.title(title), height=height)


def agreement(frame: pd.DataFrame, title: str, height: int = 230) -> alt.Chart:
    """Rows number, read, kind, value: the rank correlation of each read."""
    shown = [kind for kind in KINDS if (frame["kind"] == kind).any()]
    last = int(frame["number"].max()) if len(frame) else 1
    return (
        alt.Chart(frame)
        .mark_point(filled=True, opacity=1, size=60 if len(frame) <= 60 else 24)
        .encode(
            x=alt.X(
                "number:Q",
                scale=alt.Scale(domain=[1, last], nice=False, zero=False, padding=10),
                axis=alt.Axis(
                    title="Read of layer",
                    values=axes.ticks(1, last, keep={last: "final"}),
                    labelExpr=axes.lookup(
                        {last: "final"} if "final" in shown else {}, "format(datum.value, 'd')"
                    ),
                    grid=False,
                ),
            ),
            y=alt.Y(
                "value:Q",
                scale=alt.Scale(domain=[-1, 1]),
                axis=alt.Axis(title="Rank correlation (Spearman’s ρ)", tickCount=5, **axes.FLAT),
            ),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=shown, range=[KINDS[kind] for kind in shown]),
                legend=_kinds(shown),
            ),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=shown, range=[palette.SHAPES[i] for i in range(len(shown))]),
                legend=_kinds(shown),
            ),
            tooltip=[
                alt.Tooltip("read:N", title="Read"),
                alt.Tooltip("value:Q", title="Rank correlation", format=".2f"),
            ],
        )
        .properties(title=axes.title(title), height=height)
    )


def _kinds(shown: list[str]) -> alt.Legend:
    names = axes.lookup({}, "datum.label")
    for kind in shown:
        names = f"datum.label === {kind!r} ? {NAMES[kind]!r} : {names}"
    return alt.Legend(title=None, orient="top", direction="horizontal", labelExpr=names, offset=28)


def scatter(
    frame: pd.DataFrame, odd: pd.DataFrame, unit: str, title: str, height: int = 340
) -> alt.LayerChart:
    """Rows read, from, even, weight, value of every edge; `odd` are some of them with a label and which of the two is more."""
    names = {"weight": "More weight than effect", "effect": "More effect than weight"}
    odd = odd.assign(odd=odd["odd"].map(names))
    x = alt.X(
        "even:Q",
        scale=alt.Scale(zero=True, nice=True),
        axis=alt.Axis(title="Weight, in even shares of the read", tickCount=7, grid=False),
    )
    y = axes.signed("value", f"Attribution ({unit})", frame["value"], **axes.FLAT)
    tips = [
        alt.Tooltip("read:N", title="Read"),
        alt.Tooltip("from:N", title="Source"),
        alt.Tooltip("weight:Q", title="Weight (share of the read)", format=".3~g"),
        alt.Tooltip("even:Q", title="In even shares", format=".2f"),
        alt.Tooltip("value:Q", title=f"Attribution ({unit})", format="+.3~g"),
    ]
    dots = (
        alt.Chart(frame)
        .mark_circle(size=36 if len(frame) < 500 else 18, opacity=0.55, color="#3580a5")
        .encode(x=x, y=y, tooltip=tips)
    )
    domain = list(names.values())
    colour = alt.Color(
        "odd:N",
        scale=alt.Scale(domain=domain, range=[palette.RUNS[1], palette.RUNS[3]]),
        legend=alt.Legend(title=None, orient="top", direction="horizontal", offset=28),
    )
    shape = alt.Shape(
        "odd:N",
        scale=alt.Scale(domain=domain, range=["square", "diamond"]),
        legend=alt.Legend(title=None, orient="top", direction="horizontal", offset=28),
    )
    marked = alt.Chart(odd)
    points = marked.mark_point(filled=True, size=80, opacity=1).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=tips
    )
    labels = [
        alt.Chart(odd.iloc[[number]])
        .mark_text(align=align, dx=8 if align == "left" else -8, dy=dy, fontSize=11)
        .encode(x=x, y=y, text="label:N", color=colour)
        for number, (align, dy) in enumerate(_apart(odd, frame, y.to_dict().get("scale", {}), height))
    ]
    return alt.layer(dots, points, *labels).properties(title=axes.title(title), height=height)


_LINE, _LABEL = 13, 0.1  # height of a label [px], and its length in widths of the chart


def _apart(odd: pd.DataFrame, frame: pd.DataFrame, scale: dict, height: int) -> list[tuple[str, int]]:
    """Side and height [px] of each label beside its point, so that none lies on another."""

    def place(values: pd.Series) -> np.ndarray:
        size = float(scale.get("constant", 1)) if scale.get("type") == "symlog" else None
        found = values.to_numpy(float)
        return found if size is None else np.sign(found) * np.log1p(np.abs(found) / size)

    every = place(frame["value"])
    low, span = min(every.min(), 0), max(np.ptp([*every, 0]), 1e-30)
    across = odd["even"].to_numpy() / max(frame["even"].max(), 1e-30)
    sides = ["right" if x > 0.9 else "left" for x in across]
    starts = across - [_LABEL if side == "right" else 0 for side in sides]
    points = height * (1 - (place(odd["value"]) - low) / span)
    heights = points - 6
    taken: list[int] = []
    for number in np.argsort(points, kind="stable"):
        for other in sorted(taken, key=lambda other: heights[other]):
            near = abs(starts[number] - starts[other]) < _LABEL
            if near and abs(heights[number] - heights[other]) < _LINE:
                heights[number] = heights[other] + _LINE
        taken.append(int(number))
    return [(side, round(dy)) for side, dy in zip(sides, heights - points, strict=True)]
