"""Axes, scales and titles that every chart shares; words come from the vocabulary."""

import altair as alt

from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE, metric

STEP = "Training step"

DEPTH = {
    OUTPUT: "Source: embedding, then the output of each layer",
    STATE: "State each layer receives, then the final state",
    LAYER: "Layer",
    READ: "Read of each layer, then the final read",
    BLOCK: "Transformer block",
}


def title(text: str, subtitle: str = "") -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=subtitle) if subtitle else alt.TitleParams(text)


def measure(name: str) -> str:
    """ "Output RMS (activation units)"."""
    row = metric(name)
    return f"{row.title} ({row.unit})" if row.unit else row.title


def steps(**options) -> alt.Axis:
    return alt.Axis(title=STEP, format=",d", tickMinStep=1, grid=False, labelFlush=True, **options)


def depth(name: str, last: int | None, **options) -> alt.Axis:
    """Labels the embedding and the final state or read by name; `last` is their position, None where runs differ."""
    axes = metric(name).axes
    names = {}
    if axes == OUTPUT:
        names[0] = "emb."
    if axes in (STATE, READ) and last is not None:
        names[last] = "final"
    return alt.Axis(
        title=DEPTH[axes],
        values=ticks(1, last, keep=names) if last is not None else alt.Undefined,
        tickMinStep=1,
        labelExpr=lookup(names, "format(datum.value, 'd')"),
        labelOverlap=False,
        **options,
    )


def ticks(first: int, last: int, keep=(), count: int = 12) -> list[int]:
    """Round positions from `first` to `last`, about `count` of them, with `keep` and without crowding them."""
    step = next(
        (
            s
            for s in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 25, 40, 50, 100)
            if (last - first) / s <= count
        ),
        200,
    )
    found = {value for value in range(first, last + 1) if value == first or value % step == 0}
    kept = set(keep)
    crowd = max(1.0, step * 0.6)
    return sorted({value for value in found if all(abs(value - k) >= crowd for k in kept)} | kept)


def lookup(names: dict[int, str], otherwise: str) -> str:
    """A Vega expression that names some values: the embedding, the final read."""
    expression = otherwise
    for value, name in names.items():
        expression = f"datum.value === {value} ? {name!r} : {expression}"
    return expression


def value(name: str, scale: str, **options) -> alt.Y:
    """The measured value, linear from zero or logarithmic."""
    kind = alt.Scale(type="log", nice=True) if scale == "log" else alt.Scale(zero=True, nice=True)
    return alt.Y(
        "value:Q",
        scale=kind,
        axis=alt.Axis(
            title=measure(name), format="~g" if scale == "log" else alt.Undefined, tickCount=6, **options
        ),
    )
