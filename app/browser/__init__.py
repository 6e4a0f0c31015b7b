"""What runs in the browser: one chart, one player, and the chart library that both find there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st

from app import vega
from app.browser.spec import separate

_HERE = Path(__file__).parent
_LOADED = "\nexport default function () {}"


def load() -> None:
    """Call once in every full run of the script: the library reaches the browser once a visit."""
    st.components.v2.component("depthscope_vega", js=vega.library() + _LOADED, isolate_styles=False)(
        key="vega"
    )


def chart(
    chart: alt.TopLevelMixin,
    *,
    key: str,
    alt: str,
    step: int | None = None,
    frames: "Frames | None" = None,
    fields: Sequence[str] = (),
    on_click: Callable[[dict], None] | None = None,
    on_zoom: Callable[[dict], None] | None = None,
) -> None:
    """Draw a chart, without its title. `on_click` hears the `fields` of the clicked mark, {} for a click beside all marks;
    `on_zoom` the `first` and `last` step in sight, {} when all are again."""
    spec, signals, tables = separate(chart)
    data = {
        "spec": spec,
        "signals": signals,
        "tables": list(tables),
        "alt": alt,
        "step": step,
        "fields": list(fields) if on_click else [],
        "zoom": on_zoom is not None,
    }
    data |= {name: arrow(table) for name, table in tables.items()}
    if frames is not None and len(frames.steps) > 1:
        names = {field: f"frames {field}" for field in frames.values}
        data["frames"] = {"steps": frames.steps, "fields": names}
        data |= {names[field]: _wide(values) for field, values in frames.values.items()}
    callbacks = {}
    if on_click:
        callbacks["on_click_change"] = lambda: _heard(key, "click", on_click)
    if on_zoom:
        callbacks["on_zoom_change"] = lambda: _heard(key, "zoom", on_zoom)
    _component("chart", html=False)(key=key, data=data, **callbacks)


def player(steps: Sequence[int], at: int, *, key: str, on_step: Callable[[int | None], None]) -> None:
    """A slider over `steps` with a play button, at position `at`; `on_step` hears None at its end."""
    _component("player", html=True)(
        key=key,
        data={"steps": list(steps), "at": at},
        on_step_change=lambda: _heard(key, "step", lambda told: on_step(told.get("step"))),
    )


class Frames:
    """Numbers for playback: `values[field]` is float32 [rows, steps] for the rows of a chart's one table."""

    def __init__(self, steps: Sequence[int], values: Mapping[str, np.ndarray]):
        self.steps, self.values = [int(step) for step in steps], dict(values)


def arrow(frame: pd.DataFrame) -> pa.Table:
    """The frame without its index, in types that JavaScript reads as numbers."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    wide = [
        field.with_type(pa.float64()) if pa.types.is_int64(field.type) else field for field in table.schema
    ]
    return table.cast(pa.schema(wide)).replace_schema_metadata()


def _wide(values: np.ndarray) -> pa.Table:
    return pa.table({f"s{i}": np.ascontiguousarray(column, np.float32) for i, column in enumerate(values.T)})


def _component(name: str, html: bool):
    # Registered in every run, because a test's runtime knows nothing of the one before; the same text is no change.
    parts = {"html": _text(f"{name}.html"), "css": _text(f"{name}.css")} if html else {}
    js = _text("cells.js") + _text("chart.js") if name == "chart" else _text(f"{name}.js")
    return st.components.v2.component(f"depthscope_{name}", js=js, isolate_styles=False, **parts)


def _heard(key: str, event: str, tell: Callable[[dict], None]) -> None:
    told = st.session_state[key].get(event)
    if isinstance(told, dict):
        tell(told)


@st.cache_resource(show_spinner=False)
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
