"""Axes, scales and titles that every chart shares; words come from the vocabulary."""

import math

import altair as alt
import pandas as pd

from app.derived import metric
from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE

STEP = "Training step"

DEPTH = {
    OUTPUT: "Output of layer",
    STATE: "State into layer",
    LAYER: "Layer",
    READ: "Read of layer",
    BLOCK: "Transformer block",
}

# A y title lies flat above its axis: it is read without turning the head, and a narrow chart cannot cut it.
FLAT = {
    "titleAngle": 0,
    "titleAlign": "left",
    "titleAnchor": "end",
    "titleX": 0,
    "titleY": -12,
    "titleLimit": 0,
}

# Small numbers as 2e-4, not as a row of zeros.
SMALL = (
    "datum.value != 0 && abs(datum.value) < 0.001 ? format(datum.value, '.0e') : format(datum.value, ',~g')"
)

# A million steps as 1M, not as a row of zeros.
LARGE = "datum.value >= 1e5 ? format(datum.value, '~s') : format(datum.value, ',d')"


def title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text)


INCOMPARABLE = ("hidden_grad_rms", "block_grad_rms")  # between residual types: every picture of them says so


def measure(name: str) -> str:
    """ "Output RMS (activation units)"."""
    row = metric(name)
    more = "; not comparable between residual types" if name in INCOMPARABLE else ""
    unit = row.unit if row.unit and row.unit not in row.title.lower() else ""
    told = f"{unit}{more}" if unit else more.removeprefix("; ")
    return f"{row.title} ({told})" if told else row.title


def steps() -> alt.Axis:
    return alt.Axis(title=STEP, labelExpr=LARGE, tickMinStep=1, grid=False, labelFlush=False, tickCount=6)


def along(column: str, x: str, values: pd.Series, scale: str) -> alt.X:
    """What a curve runs along: step, tokens or wall time."""
    axis = steps() if x == "step" else alt.Axis(title=measure(x), format="~s", grid=False, tickCount=6)
    if scale == "log" and len(values):
        low, high = float(values.min()), float(values.max())
        axis.values = decades(low, high * 1.0001) or alt.Undefined
        return alt.X(f"{column}:Q", axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    return alt.X(f"{column}:Q", axis=axis, scale=alt.Scale(nice=False, zero=False))


def depth(name: str, last: int | None, count: int = 12, **options) -> alt.Axis:
    """An axis of layers that names the embedding and the final state or read.

    `last` is the last position, None where the runs differ in it; `count` is about how many labels there are.
    """
    axes = metric(name).axes
    names = {}
    if axes == OUTPUT:
        names[0] = "emb."
    if axes in (STATE, READ) and last is not None:
        names[last] = "final"
    return alt.Axis(
        title=DEPTH[axes],
        values=ticks(1, last, keep=names, count=count) if last is not None else alt.Undefined,
        tickMinStep=1,
        labelExpr=lookup(names, "format(datum.value, 'd')"),
        labelOverlap=False,
        grid=False,
        **options,
    )


def ticks(first: int, last: int, keep=(), count: int = 12) -> list[int]:
    """About `count` round positions from `first` to `last`, with `keep` and without crowding them."""
    sizes = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100)
    step = next((size for size in sizes if (last - first) / size <= count), 200)
    kept = set(keep) if any(value <= first for value in keep) else {first, *keep}
    crowd = 0.7 * step
    round_ones = [value for value in range(first, last + 1) if value % step == 0]
    found = {value for value in round_ones if all(abs(value - k) >= crowd for k in kept)}
    return sorted(value for value in found | kept if value <= last)


def lookup(names: dict[int, str], otherwise: str) -> str:
    """A Vega expression that names some values: the embedding, the final read."""
    expression = otherwise
    for value, name in names.items():
        expression = f"datum.value === {value} ? {name!r} : {expression}"
    return expression


def value(column: str, label: str, values: pd.Series, scale: str, zero: bool = True) -> alt.Y:
    """The measured value: linear, or logarithmic with labels at 1, 2 and 5 times powers of ten."""
    if scale != "log":
        axis = alt.Axis(title=label, tickCount=6, **FLAT)
        return alt.Y(f"{column}:Q", scale=alt.Scale(zero=zero, nice=True), axis=axis)
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 10.0)
    low, high = low / 1.15, high * 1.15
    axis = alt.Axis(title=label, values=decades(low, high), labelExpr=SMALL, **FLAT)
    return alt.Y(f"{column}:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


def decades(low: float, high: float) -> list[float]:
    """Readable ticks of a logarithmic axis: powers of ten, with 2 and 5 between where there are few."""
    span = math.log10(high / low)
    steps = (1, 2, 5) if span <= 2.2 else (1, 3) if span <= 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, round(span / 8))
    found = [m * 10.0**p for p in powers if p % every == 0 for m in steps]
    return [float(f"{v:.1g}") for v in found if low <= v <= high]


def signed(column: str, label: str, values: pd.Series, channel: type = alt.Y, **options) -> alt.Y | alt.X:
    """Values of either sign: linear, or where a few are far larger than the others, logarithmic on both sides of zero."""
    size = values.abs()
    size = size[size > 0]
    most, middle = (float(size.max()), float(size.median())) if len(size) else (1.0, 1.0)
    if most <= 30 * middle:
        axis = alt.Axis(title=label, tickCount=5, **options)
        return channel(f"{column}:Q", axis=axis, scale=alt.Scale(zero=True))
    powers = range(math.ceil(math.log10(middle)), math.floor(math.log10(most)) + 1)
    ticks = [10.0**power for power in powers][-5:]
    below = [-tick for tick in ticks if values.min() <= -tick]
    shown = "datum.value === 0 ? '0' : abs(datum.value) < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')"
    axis = alt.Axis(title=label, values=[*below, 0, *ticks], labelExpr=shown, **options)
    scale = alt.Scale(type="symlog", constant=float(f"{middle:.0e}"), nice=False)
    return channel(f"{column}:Q", axis=axis, scale=scale)
