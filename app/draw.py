"""The only door to drawing: a chart under its title, with ways to save it."""

import io
from collections.abc import Callable, Sequence

import altair as alt
import pandas as pd
import streamlit as st
import vl_convert

from app import browser, words
from app.browser import Frames
from app.charts import palette

PICTURES = {"png": "image/png", "svg": "image/svg+xml", "pdf": "application/pdf"}
SHORT = "short names"  # what stands for the long names of the runs on the page, in titles on the screen
NUMBERS = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}


def show(
    chart: alt.TopLevelMixin,
    *,
    key: str,
    data: pd.DataFrame | None = None,
    frames: Frames | None = None,
    fields: Sequence[str] = (),
    on_click: Callable[[dict], None] | None = None,
    on_zoom: Callable[[dict], None] | None = None,
) -> None:
    """Draw `chart` under its title, which is text so that it wraps. `key` is stable and names saved files.

    `frames` are the rows' numbers at other steps, for the player; `on_click` hears the `fields` of a clicked mark,
    `on_zoom` the steps in sight.
    """
    title, subtitle = _title(chart)
    with st.container(horizontal=True, wrap=False, vertical_alignment="center", gap="small"):
        # Long names of runs are read in full above and in the legend.
        told = words.replaced(title, st.session_state.get(SHORT, {}))
        st.markdown(f"**{words.plain(told)}**", width="stretch")
        with st.popover("Save", icon=":material/download:", type="tertiary", key=f"save {key}"):
            _save(chart, data, key)
    if subtitle:
        st.caption(words.plain(subtitle))
    browser.chart(
        chart, key=f"chart {key}", alt=title, frames=frames, fields=fields, on_click=on_click, on_zoom=on_zoom
    )


def _save(chart: alt.TopLevelMixin, data: pd.DataFrame | None, key: str) -> None:
    """Buttons whose files are made when they are pressed."""
    stem = f"depthscope {key}".replace("/", "-").replace(" ", "-")
    files = [("Picture", kind, mime, lambda kind=kind: image(chart, kind)) for kind, mime in PICTURES.items()]
    if data is not None:
        files += [
            ("Numbers", kind, mime, lambda kind=kind: numbers(data, kind)) for kind, mime in NUMBERS.items()
        ]
    for what, kind, mime, make in files:
        st.download_button(
            f"{what} ({kind.upper() if kind != 'parquet' else 'Parquet'})",
            data=make,
            file_name=f"{stem}.{kind}",
            mime=mime,
            key=f"{kind} {key}",
            on_click="ignore",
            width="stretch",
        )


def image(chart: alt.TopLevelMixin, kind: str) -> bytes:
    """The chart with its title on white, as "png" (two pixels a point), "svg" or "pdf"."""
    spec = palette.printed(chart)
    if kind == "svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    if kind == "pdf":
        return vl_convert.vegalite_to_pdf(spec)
    return vl_convert.vegalite_to_png(spec, scale=2)


def numbers(data: pd.DataFrame, kind: str) -> bytes:
    """The rows of a chart as "csv" or "parquet"."""
    if kind == "csv":
        return data.to_csv(index=False).encode()
    out = io.BytesIO()
    data.to_parquet(out, index=False)
    return out.getvalue()


def _title(chart: alt.TopLevelMixin) -> tuple[str, str]:
    title = chart.title
    if isinstance(title, alt.TitleParams):
        subtitle = title.subtitle
        return str(title.text), "" if subtitle is alt.Undefined else str(subtitle)
    return ("", "") if title is alt.Undefined else (str(title), "")
