"""Colours and print settings. Run colours are Okabe and Ito's, apart for every common colour blindness."""

import math
from collections.abc import Mapping, Sequence

import altair as alt

from app.charts import TURN, axes

RUNS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]

_HUES = [0, 1, 2, 3, 1, 0, 4]  # of RUNS: two blues and two oranges are told apart less easily
FOCUS = "#D55E00"  # what somebody clicked

# Small to large, on paper; app/.streamlit/config.toml has the same for the light theme and one for the dark.
RAMP = [
    "#edf6f1", "#d0efd9", "#a3e0bf", "#66d0ad", "#3fb6ad",
    "#359caa", "#3580a5", "#3a60a0", "#403a75", "#2a1a3a",
]  # fmt: skip

# Less to more, zero in the middle, on paper.
DIVERGING = [
    "#08519c", "#3b83bd", "#78b0d8", "#b5d3e8", "#eef0f2",
    "#f2f0ee", "#f6cfa9", "#eea163", "#d9701f", "#a34400",
]  # fmt: skip

_TEXT = {"labelFontSize": 11, "titleFontSize": 12, "labelColor": "#3d4450", "titleColor": "#1c2430"}
PAPER = {
    "font": "Liberation Sans, Arial, sans-serif",
    "title": {"anchor": "start", "fontSize": 15, "fontWeight": 600, "color": "#1c2430", "offset": 12},
    "axis": {
        **_TEXT,
        "gridColor": "#e6e9ee",
        "domainColor": "#c4cad4",
        "tickColor": "#c4cad4",
        "titleFontWeight": 500,
    },
    "legend": {**_TEXT, "titleFontWeight": 500},
    "range": {"heatmap": RAMP, "ramp": RAMP, "category": RUNS, "diverging": DIVERGING},
    "view": {"stroke": None},
}


def painted(field: str, scale: str = "linear", fill: dict | None = None, **edges: tuple[str, float]) -> dict:
    """The usermeta of a chart whose cells, the rows of its first table, the browser paints as pixels.

    `field` is coloured on a `scale`; `left`, `right`, `top` and `bottom` are columns and what to add to them; `fill` as
    of `filling`.
    """
    return {
        "embedOptions": {"renderer": "canvas"},
        "cells": {"colour": field, "scale": scale, **{side: list(edge) for side, edge in edges.items()}},
        **(fill or {}),
    }


def filling(taken: int, least: int, most: int) -> dict:
    """The usermeta of a chart as high as the window leaves it: `taken` pixels by other things, `least` and `most`."""
    return {"room": {"taken": taken, "least": least, "most": most}}


def assign(
    everyone: Sequence[str], selected: Sequence[str], before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A colour for each selected run: the one it had `before`, else by its place among the first six of all runs, else a
    free one, of another hue than those taken if there is any; grey only where nothing else is free."""
    before = before or {}
    place = {run: index for index, run in enumerate(everyone)}
    taken: dict[str, str] = {}

    def own(run: str) -> int | None:
        """Which colour is the run's by right."""
        found = RUNS.index(before[run]) if run in before else place.get(run, len(RUNS))
        return found if run in before or found < len(RUNS) - 1 else None

    for run in sorted(selected, key=lambda run: (run not in before, own(run) is None)):
        want = own(run)
        hues = {_HUES[RUNS.index(colour)] for colour in taken.values()}
        start = 0 if want is None else want
        order = [(start + shift) % len(RUNS) for shift in range(len(RUNS))]
        if want is None:
            order.sort(key=lambda at: (at == len(RUNS) - 1, _HUES[at] in hues, at))
        elif RUNS[want] in taken.values():
            order.sort(key=lambda at: at == len(RUNS) - 1)  # grey last
        taken[run] = next((RUNS[at] for at in order if RUNS[at] not in taken.values()), RUNS[order[0]])
    return {run: taken[run] for run in selected}


def colour(colours: dict[str, str], symbol: str = "") -> alt.Color:
    """The colour channel of a chart whose rows have a `run`; a legend where there are several."""
    return alt.Color(
        "run:N",
        sort=list(colours),
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        legend=_legend(colours, symbol) if len(colours) > 1 else None,
    )


def shape(colours: dict[str, str]) -> alt.Shape:
    """The shape channel: the same run, told without colour."""
    shapes = [SHAPES[RUNS.index(value)] for value in colours.values()]
    return alt.Shape(
        "run:N",
        sort=list(colours),
        scale=alt.Scale(domain=list(colours), range=shapes),
        legend=_legend(colours) if len(colours) > 1 else None,
    )


def shades(domain: tuple[float, float]) -> alt.Scale:
    """The colour scale of cells: logarithmic above zero, a square root from zero, and centred on zero from below it."""
    if domain[0] < 0:
        return alt.Scale(domain=list(domain), domainMid=0, range="diverging", clamp=True, nice=False)
    return alt.Scale(type="log" if domain[0] > 0 else "sqrt", domain=list(domain), clamp=True, nice=False)


def gradient(title: str, domain: tuple[float, float] | None = None) -> alt.Legend:
    """A legend of a colour scale, flat above the chart; labels of a log scale come from its `domain`."""
    values = alt.Undefined
    if domain:
        low, high = domain
        values = axes.decades(low, high)[-6:]
        if len(values) < 2:
            values = [float(f"{value:.2g}") for value in (low * 1.01, (low * high) ** 0.5, high * 0.99)]
    return alt.Legend(
        title=title.replace(" (", "\n(").split("\n") if len(title) > 36 else title,
        titleLimit=0,
        orient="top",
        direction="horizontal",
        gradientLength=190,
        gradientThickness=8,
        labelExpr=axes.SMALL,
        tickCount=4,
        values=values,
        offset=28,
    )


def gradient_beside(length: int, domain: tuple[float, float]) -> alt.Legend:
    """A legend of a colour scale, upright at the right of a chart, with about four round labels."""
    low, high = domain
    size = 10 ** math.floor(math.log10(high - low))
    apart = next(each for each in (0.1, 0.2, 0.25, 0.5, 1, 2) if (high - low) / (each * size) <= 5) * size
    values = [round(at * apart, 12) for at in range(math.ceil(low / apart), math.floor(high / apart) + 1)]
    return alt.Legend(
        title=None,
        orient="right",
        gradientLength=length,
        gradientThickness=8,
        labelExpr=axes.SMALL,
        values=values,
        offset=14,
    )


def under(cells: int) -> float:
    """How many cells a cell reaches under the next ones so that no seam shows: about one and a half pixels.

    Two neighbours that share a pixel would each colour a part of it and let the background through.
    """
    # Few distinct values, so that a growing heatmap stays the same chart.
    return next((reach for reach in (0.05, 0.1, 0.2, 0.35, 0.6, 1.0) if reach >= cells / 130), 2.0)


def _columns(colours: dict[str, str]) -> int:
    longest = max(map(len, colours))
    return 3 if longest <= 16 else 2 if longest <= 24 else 1


def _legend(colours: dict[str, str], symbol: str = "") -> alt.Legend:
    look = {"symbolType": symbol, "symbolStrokeWidth": 3} if symbol else {}
    return alt.Legend(
        title=None,
        orient="top",
        direction="horizontal",
        columns=_columns(colours),
        labelLimit=0,
        symbolSize=90,
        symbolOpacity=1,
        columnPadding=18,
        offset=28,
        **look,
    )


def printed(chart: alt.TopLevelMixin) -> dict:
    """The chart as a specification for paper: white, own fonts, own ramp, its title wrapped to its width."""
    with TURN, alt.data_transformers.enable("default", max_rows=None):
        spec = chart.to_dict(format="vega-lite")
    title = spec.get("title")
    if isinstance(title, dict) and isinstance(title.get("text"), str):
        title["text"] = wrapped(title["text"], 86)
    for layer in spec.get("layer", ()):
        if layer.get("name") == "points":
            # Those that only carry a tooltip are a megabyte of nothing on paper.
            layer["transform"] = [{"filter": "seen || datum.alone"}]
    spec.setdefault("width", 680)
    spec["background"] = "white"
    spec["padding"] = 16
    spec["config"] = PAPER
    return spec


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at spaces."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
