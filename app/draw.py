"""The only door to drawing: a chart under its title, with ways to save it."""

import altair as alt
import pandas as pd
import streamlit as st
import vl_convert

from app import words
from app.charts import palette


def show(chart: alt.TopLevelMixin, *, key: str, data: pd.DataFrame | None = None) -> None:
    """Draw `chart` under its title, which is text so that it wraps. `key` is stable and names saved files."""
    title, subtitle = _title(chart)
    head = st.container(horizontal=True, wrap=False, vertical_alignment="center", gap="small")
    with head:
        st.markdown(f"**{words.plain(title)}**", width="stretch")
        with st.popover("Save", icon=":material/download:", type="tertiary", key=f"save {key}"):
            stem = f"depthscope {key}".replace("/", "-").replace(" ", "-")
            for kind, mime in (("png", "image/png"), ("svg", "image/svg+xml")):
                st.download_button(
                    f"Picture ({kind.upper()})",
                    data=lambda kind=kind: image(chart, kind),
                    file_name=f"{stem}.{kind}",
                    mime=mime,
                    key=f"{kind} {key}",
                    on_click="ignore",
                    width="stretch",
                )
            if data is not None:
                st.download_button(
                    "Numbers (CSV)",
                    data=lambda: data.to_csv(index=False).encode(),
                    file_name=f"{stem}.csv",
                    mime="text/csv",
                    key=f"csv {key}",
                    on_click="ignore",
                    width="stretch",
                )
    if subtitle:
        st.caption(words.plain(subtitle))
    bare = chart.copy(deep=False)
    bare.title = alt.Undefined
    st.altair_chart(bare, key=f"chart {key}", alt=title, width="stretch")


def image(chart: alt.TopLevelMixin, kind: str) -> bytes:
    """The chart with its title on white, as "png" (two pixels a point) or "svg"."""
    spec = palette.printed(chart)
    if kind == "svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return vl_convert.vegalite_to_png(spec, scale=2)


def _title(chart: alt.TopLevelMixin) -> tuple[str, str]:
    title = chart.title
    if isinstance(title, alt.TitleParams):
        subtitle = title.subtitle
        return str(title.text), "" if subtitle is alt.Undefined else str(subtitle)
    return ("", "") if title is alt.Undefined else (str(title), "")
