"""Focus: the read and the source somebody clicked. The read as bars and over training, and who else reads the source."""

import numpy as np
import pandas as pd
import streamlit as st

from app import cells, draw, reading, room, view, words
from app.charts import palette
from app.charts.bars import bars
from app.charts.lines import lines
from probes.vocabulary import metric

FOLLOWED = 5  # sources whose weight is followed over training


def chosen(one: room.Shown, name: str = "depth_weight") -> tuple[int | None, int | None]:
    """Read (1 to R) and source (0 to S-1) in focus of this run; None where there is none."""
    now = view.current()
    if now.focus != one.name:
        return None, None
    there = cells.exists(one.run, name)
    read = now.read if now.read is not None and 1 <= now.read <= len(there) else None
    if now.read is not None and read is None:
        return None, None
    readers = there[read - 1] if read is not None else there.any(axis=0)
    known = now.source is not None and now.source < len(readers) and readers[now.source]
    return read, now.source if known else None


def choose(one: room.Shown, told: dict) -> None:
    """Put what was clicked in focus: a cell's read and source, or a source alone; the same again lets go."""
    now = view.current()
    read, source = (
        int(value) if value is not None else None for value in (told.get("number"), told.get("source"))
    )
    if source is None or (now.focus, now.read, now.source) == (one.name, read, source):
        view.change(focus="", read=None, source=None)
    else:
        view.change(focus=one.name, read=read, source=source)


def show(one: room.Shown, frame: pd.DataFrame, name: str) -> None:
    """Below the triangle: what the click asked about; nothing when nothing is in focus. `frame` has all its cells."""
    read, source = chosen(one, name)
    if (read is None and source is None) or frame.empty:
        return
    about = one.run.reads[read - 1].label if read is not None else cells.columns(one.run, name)[source]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(
            f"{words.capital(words.the(about))} of {words.plain(one.name)}", anchor=False, width="content"
        )
        st.button(
            "Let go of this read" if read is not None else "Let go of this source",
            icon=":material/close:",
            type="tertiary",
            on_click=lambda: choose(one, {}),
        )
        if len(one.run.token_steps) and name not in cells.RECOVERED:
            params = view.current().params()
            st.page_link(
                "pages_/tokens.py", label="Token by token", icon=":material/text_fields:", query_params=params
            )
    if read is None:
        _readers(one, read, source, frame, name)
        return
    parts = st.columns(3 if source is not None else 2, gap="medium", vertical_alignment="bottom")
    row = frame[frame["number"] == read]
    with parts[0]:
        _row(one, about, row, name, source)
    with parts[1]:
        _history(one, read, row, name)
    if source is not None:
        with parts[2]:
            _readers(one, read, source, frame, name)


def _row(one: room.Shown, label: str, row: pd.DataFrame, name: str, source: int | None) -> None:
    """The read as bars, one a source."""
    table = _bars(row, name, "from", row["source"] == source)
    told = label
    if table["value"].notna().any():
        ranked = table.dropna(subset=["value"]).sort_values("value", ascending=False)["place"].tolist()
        told = f"{words.capital(words.the(label))} reads {words.the(ranked[0])} most"
        if ranked[0] == table["place"].iloc[-1] and len(ranked) > 1:
            told += f", and besides this neighbour {words.the(ranked[1])}"
    draw.show(bars(table, metric(name).title, "Source", told), key=f"row {one.name}", data=table)


def _readers(one: room.Shown, read: int | None, source: int, frame: pd.DataFrame, name: str) -> None:
    """Everyone who reads the source, as bars."""
    column = frame[frame["source"] == source]
    table = _bars(column, name, "read", column["number"] == read)
    label = words.the(cells.columns(one.run, name)[source])
    even = int((column[name] * column["sources"] > 1).sum())
    told = f"What reads get from {label}"
    if name == "depth_weight":
        told = f"{even} of {len(table)} reads give {label} more than an even share"
    elif name == "mixing_share":
        told = f"{label} makes up more than an even share of {even} of {len(table)} states"
    draw.show(
        bars(table, metric(name).title, "Read of layer", words.capital(told)),
        key=f"column {one.name}",
        data=table,
    )


def _history(one: room.Shown, read: int, row: pd.DataFrame, name: str) -> None:
    """The strongest sources of one read over training, one line each."""
    steps = reading.steps(one.run, name)
    strongest = row.dropna(subset=[name]).sort_values(name, ascending=False)["source"].to_numpy()[:FOLLOWED]
    if not len(strongest):
        return
    labels = cells.columns(one.run, name)
    when, pasts = reading.course(one.run, name, [(read - 1, int(s)) for s in strongest], len(steps) - 1)
    segment = reading.segments(one.run, name, np.searchsorted(steps, when))
    parts = [
        pd.DataFrame({"run": words.short(labels[s]), "step": when, "value": past, "segment": segment})
        for s, past in zip(strongest, pasts.T, strict=True)
    ]
    frame = pd.concat(parts, ignore_index=True)
    colours = dict(zip(dict.fromkeys(frame["run"]), palette.RUNS, strict=False))
    past = pasts[:, 0]
    past = past[np.isfinite(past)]
    title = (
        f"From {words.the(labels[strongest[0]])}: {words.number(float(past[0]))} at first, "
        f"{words.number(float(past[-1]))} at last"
    )
    chart = lines(frame, "value", metric(name).title, colours, title, zero=True, height=250)
    draw.show(chart, key=f"history {one.name}", data=frame)


def _bars(part: pd.DataFrame, name: str, place: str, marked: pd.Series) -> pd.DataFrame:
    places = part[place].astype(str)
    return pd.DataFrame(
        {
            "place": places,
            "short": places.map(words.short),
            "value": part[name],
            "spread": part["depth_weight_std"] if name == "depth_weight" else np.nan,
            "chosen": marked,
        }
    )
