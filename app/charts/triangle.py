"""The read × source triangle: who reads whom. Cells that do not exist stay blank."""

import altair as alt
import pandas as pd

from app.charts import axes, palette
from probes.vocabulary import metric

# Distances between labels; odd ones show attention and MLP reads in turn.
ODD = (1, 3, 5, 7, 9, 15, 25, 35, 55)
EVEN = (1, 2, 4, 5, 10, 20, 25, 50)

METRICS = (
    "depth_weight", "depth_weight_std", "contribution_rms", "mixing_weight", "mixing_share", "mixing_r2",
    "depth_attribution",
)  # fmt: skip
TAKEN = 430  # pixels of a page above and below its first triangle


def triangle(
    cells: pd.DataFrame,
    name: str,
    title: str,
    domain: tuple[float, float],
    focus: tuple[int | None, int | None] = (None, None),
    height: int = 540,
    legend: str = "",
    told: dict[str, str] | None = None,
    below: int = 0,
) -> alt.LayerChart:
    """Rows row, number, read, source, from and metrics, as of app.cells.cells; `name` is the one drawn.

    `focus` frames the row of a read (its number) and the column of a source. A `domain` from zero colours on a
    square-root scale, so that small weights stay apart from none; one from below zero is centred there. `legend` replaces
    the metric's name there, `told` the columns that a tooltip tells, with their titles; `below` are pixels that the
    window has to leave below it.
    """
    reads = dict(zip(cells["row"].astype(int), cells["read"].astype(str), strict=True))
    sources = dict(zip(cells["source"].astype(int), cells["from"].astype(str), strict=True))
    blocks = any(label.startswith("depth block ") for label in sources.values())
    if told is None:
        told = {n: metric(n).title for n in METRICS if n in cells and cells[n].notna().any()}
    # Seams between few cells are a grid; between many they are noise.
    wide, high = (palette.under(len(names)) if len(names) > 64 else 0 for names in (sources, reads))
    half = {
        "left": "source - 0.5",
        "right": f"source + 0.5 + {wide}",
        "top": "row - 0.5",
        "bottom": f"row + 0.5 + {high}",
    }
    grid = (
        alt.Chart(cells[["row", "number", "source", "read", "from", *dict.fromkeys([name, *told])]])
        .transform_calculate(**{side: f"datum.{where}" for side, where in half.items()})
        .mark_rect(strokeWidth=0, opacity=1, clip=True)
        .encode(
            x=alt.X(
                "left:Q",
                scale=_span(sources),
                axis=alt.Axis(
                    title="Source: embedding, then depth block"
                    if blocks
                    else "Source: embedding, then layer",
                    **_labels(sources, short_source, EVEN),
                ),
            ),
            x2=alt.X2("right:Q"),
            y=alt.Y(
                "top:Q",
                scale=_span(reads, reverse=True),
                axis=alt.Axis(title="Read of layer", **_labels(reads, _short_read, ODD), **axes.FLAT),
            ),
            y2=alt.Y2("bottom:Q"),
            color=_colour(name, domain, _corner(cells), legend),
            tooltip=[
                alt.Tooltip("read:N", title="Read"),
                alt.Tooltip("from:N", title="Source"),
                *(alt.Tooltip(f"{other}:Q", title=label, format=".3~g") for other, label in told.items()),
            ],
        )
    )
    frame = (
        alt.Chart(outline(cells, *focus))
        .mark_rect(fillOpacity=0, stroke=palette.FOCUS, strokeWidth=2, clip=False)
        .encode(
            x=alt.X("left:Q", scale=_span(sources)),
            x2=alt.X2("right:Q"),
            y=alt.Y("top:Q", scale=_span(reads, reverse=True)),
            y2=alt.Y2("bottom:Q"),
        )
    )
    painted = palette.painted(
        name,
        "linear" if domain[0] < 0 else "sqrt",
        _room(len(reads), _corner(cells), below),
        left=("source", -0.5),
        right=("source", 0.5),
        top=("row", -0.5),
        bottom=("row", 0.5),
    )
    return alt.layer(grid, frame, title=axes.title(title), height=height, usermeta=painted)


def _colour(name: str, domain: tuple[float, float], corner: bool, title: str) -> alt.Color:
    legend = palette.gradient(title or axes.measure(name))
    if corner:
        legend.orient, legend.offset = "top-right", 4
        legend.gradientLength = 170
    return alt.Color(f"{name}:Q", scale=palette.shades(domain), legend=legend)


def _corner(cells: pd.DataFrame) -> bool:
    """Whether the upper right corner is free of cells, so that the legend finds its place there."""
    if cells.empty:
        return False
    upper = cells[cells["row"] < 0.17 * (cells["row"].max() + 1)]
    return bool(upper["source"].max() + 1 <= 0.45 * (cells["source"].max() + 1))


def _room(reads: int, corner: bool, below: int) -> dict:
    """As high as the window leaves it, and three pixels a row at least as far as one screen goes."""
    taken = TAKEN + below + (0 if corner else 60)
    return palette.filling(taken, max(300, min(620, 3 * reads)), 900)


def outline(cells: pd.DataFrame, read: int | None, source: int | None) -> pd.DataFrame:
    """left, right, top, bottom of the frames around a read's row and a source's column, where they are shown."""
    row = cells[cells["number"] == read] if read is not None else cells[:0]
    column = cells[cells["source"] == source] if source is not None else cells[:0]
    return pd.DataFrame(
        [
            (
                float(part["source"].min()) - 0.5,
                float(part["source"].max()) + 0.5,
                float(part["row"].min()) - 0.5,
                float(part["row"].max()) + 0.5,
            )
            for part in (row, column)
            if len(part)
        ],
        columns=["left", "right", "top", "bottom"],
        dtype=float,
    )


def _span(names: dict[int, str], reverse: bool = False) -> alt.Scale:
    return alt.Scale(domain=[-0.5, max(names, default=0) + 0.5], nice=False, zero=False, reverse=reverse)


def _labels(names: dict[int, str], short, distances: tuple[int, ...]) -> dict:
    """Sparse ticks: the first, the last and evenly spaced ones between, each by its short name."""
    last = max(names, default=0)
    every = next((distance for distance in distances if last / distance <= 13), distances[-1] * 2)
    values = [i for i in range(last + 1) if i in (0, last) or (i % every == 0 and last - i >= 0.8 * every)]
    shown = axes.lookup({i: short(names[i]) for i in values}, "''")
    return {"values": values, "labelExpr": shown, "grid": False, "labelOverlap": False}


def _short_read(label: str) -> str:
    """ "layer 12 (MLP)" is "12 MLP", the final read "final"."""
    if label == "final read":
        return "final"
    return label.removeprefix("layer ").replace("(", "").replace(")", "").replace("attention", "att.")


def short_source(label: str) -> str:
    """ "emb.", and the number of a layer or depth block."""
    if label == "embedding":
        return "emb."
    return next((word for word in label.split() if word.isdecimal()), label)
