"""The read × source triangle: who reads whom. Cells that do not exist stay blank."""

import altair as alt
import pandas as pd

from app.charts import axes
from probes.vocabulary import metric


def triangle(
    cells: pd.DataFrame, name: str, title: str, domain: tuple[float, float], height: int = 460
) -> alt.Chart:
    """Rows row, read, source, from and the metrics of app.frames.cells; `name` is the one drawn.

    Colour is on a square-root scale, so that small weights stay apart from none.
    """
    reads = dict(zip(cells["row"].astype(int), cells["read"].astype(str), strict=True))
    sources = dict(zip(cells["source"].astype(int), cells["from"].astype(str), strict=True))
    size = 10 if len(reads) > 60 else 11
    options = {"grid": False, "labelOverlap": False, "labelFontSize": size, "ticks": True, "tickSize": 3}
    return (
        alt.Chart(cells)
        .transform_calculate(
            left="datum.source - 0.5", right="datum.source + 0.5", top="datum.row - 0.5", bottom="datum.row + 0.5"
        )
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X(
                "left:Q",
                scale=_span(sources),
                axis=alt.Axis(title=_source_title(sources), **_labels(sources, _short_source), **options),
            ),
            x2="right:Q",
            y=alt.Y(
                "top:Q",
                scale=_span(reads, reverse=True),
                axis=alt.Axis(title="Read of layer", **_labels(reads, _short_read), **options),
            ),
            y2="bottom:Q",
            color=alt.Color(
                f"{name}:Q",
                scale=alt.Scale(type="sqrt", domain=list(domain), clamp=True, nice=False),
                legend=alt.Legend(
                    title=axes.measure(name), titleLimit=0, orient="top", direction="horizontal", titleOrient="left",
                    titleAnchor="middle", gradientLength=180, gradientThickness=10, format=".2~g", tickCount=4,
                ),
            ),
            tooltip=[
                alt.Tooltip("read:N", title="Read"),
                alt.Tooltip("from:N", title="Source"),
                *(
                    alt.Tooltip(f"{other}:Q", title=metric(other).title, format=".3~f" if "weight" in other else ".3~g")
                    for other in ("depth_weight", "depth_weight_std", "contribution_rms")
                    if cells[other].notna().any()
                ),
            ],
        )
        .properties(title=axes.title(title), height=height, usermeta={"embedOptions": {"renderer": "canvas"}})
    )  # fmt: skip


def _span(names: dict[int, str], reverse: bool = False) -> alt.Scale:
    return alt.Scale(domain=[-0.5, max(names, default=0) + 0.5], nice=False, zero=False, reverse=reverse)


def _labels(names: dict[int, str], short) -> dict:
    """Sparse ticks: first, last and round layer numbers between, each by its short name."""
    last = max(names, default=0)
    every = max(1, round(last / 12))
    values = [i for i in range(last + 1) if i in (0, last) or (i % every == 0 and last - i >= 0.7 * every)]
    shown = {i: short(names[i]) for i in values}
    return {"values": values, "labelExpr": axes.lookup(shown, "''")}


def _short_read(label: str) -> str:
    """ "layer 12 (MLP)" is "12 MLP", the final read "final"."""
    if label == "final read":
        return "final"
    return _numbered(label)


def _short_source(label: str) -> str:
    if label == "embedding":
        return "emb."
    if label.startswith("depth block "):
        return label.split()[2]
    return _numbered(label).split()[0]


def _numbered(label: str) -> str:
    words = label.removeprefix("layer ").replace("(", "").replace(")", "").replace("attention", "att.")
    return words


def _source_title(names: dict[int, str]) -> str:
    if any(name.startswith("depth block ") for name in names.values()):
        return "Source: embedding, then depth blocks (the newest one still growing)"
    return "Source: embedding, then the output of each layer"
