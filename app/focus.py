"""Focus: the read and the source somebody clicked. The read as bars and over training, and who else reads the source."""

import numpy as np
import pandas as pd
import streamlit as st

from app import draw, frames, room, view, words
from app.charts import palette
from app.charts.bars import bars
from app.charts.lines import lines
from probes.vocabulary import metric

FOLLOWED = 5  # sources whose weight is followed over training


def chosen(one: room.Shown) -> tuple[int | None, int | None]:
    """Read (1 to R) and source (0 to S-1) in focus of this run; None where there is none."""
    now = view.current()
    if now.focus != one.name or now.read is None or not 1 <= now.read <= len(one.run.reads):
        return None, None
    known = now.source is not None and now.source < one.run.reads[now.read - 1].sources
    return now.read, now.source if known else None


def choose(one: room.Shown, told: dict) -> None:
    """Put a clicked cell in focus; a click beside all cells, or on the same one again, lets go."""
    picked = (told.get("number"), told.get("source"))
    if picked[0] is None or picked == chosen(one):
        view.change(focus="", read=None, source=None)
    else:
        view.change(focus=one.name, read=int(picked[0]), source=int(picked[1]))


def show(one: room.Shown, cells: pd.DataFrame, name: str) -> None:
    """Below the triangle: what the click asked about; nothing when nothing is in focus."""
    read, source = chosen(one)
    if read is None or cells.empty:
        return
    label, unit = one.run.reads[read - 1].label, metric(name).title
    st.subheader(f"{words.capital(_the(label))} of {words.plain(one.name)}", anchor=False)
    left, middle, right = st.columns(3, gap="medium", vertical_alignment="bottom")
    row = cells[cells["number"] == read]
    with left:
        frame = _bars(row, name, "from", row["source"] == source, _short)
        top = frame.loc[frame["value"].idxmax()] if frame["value"].notna().any() else None
        told = f"{words.capital(_the(label))} reads {_the(top['place'])} most" if top is not None else label
        draw.show(bars(frame, unit, "Source", told), key=f"row {one.name}", data=frame)
    with middle:
        _history(one, read, row, name)
    if source is not None:
        with right:
            column = cells[cells["source"] == source]
            frame = _bars(column, name, "read", column["number"] == read, _short)
            even = (column[name] * column["sources"] > 1).sum()
            of = f"{even} of {len(frame)} reads give {_the(one.run.sources[source].label)} more than an even share"
            if name != "depth_weight":
                of = f"What reads get from {_the(one.run.sources[source].label)}"
            draw.show(bars(frame, unit, "Read of layer", of), key=f"column {one.name}", data=frame)
    st.button(
        "Let go of this read", icon=":material/close:", type="tertiary", on_click=lambda: choose(one, {})
    )


def _history(one: room.Shown, read: int, row: pd.DataFrame, name: str) -> None:
    """The strongest sources of one read over training, one line each."""
    steps, values = frames.series(one.run, name)
    strongest = row.sort_values(name, ascending=False)["source"].to_numpy()[:FOLLOWED]
    parts = [
        pd.DataFrame(
            {"run": _short(one.run.sources[s].label), "step": steps, "value": values[:, read - 1, s]}
        )
        for s in strongest
    ]
    frame = pd.concat(parts, ignore_index=True)
    colours = dict(zip(dict.fromkeys(frame["run"]), palette.RUNS, strict=False))
    first = one.run.sources[strongest[0]].label
    past = values[:, read - 1, strongest[0]]
    past = past[np.isfinite(past)]
    title = f"From {_the(first)}: {words.number(float(past[0]))} at first, {words.number(float(past[-1]))} at last"
    chart = lines(frame, "value", metric(name).title, colours, title, zero=True, height=250)
    draw.show(chart, key=f"history {one.name}", data=frame)


def _bars(part: pd.DataFrame, name: str, place: str, marked: pd.Series, short) -> pd.DataFrame:
    places = part[place].astype(str)
    return pd.DataFrame(
        {
            "place": places,
            "short": places.map(short),
            "value": part[name],
            "spread": part["depth_weight_std"] if name == "depth_weight" else np.nan,
            "chosen": marked,
        }
    )


def _the(label: str) -> str:
    return f"the {label}" if label in ("embedding", "final read") else label


def _short(label: str) -> str:
    """ "emb.", "final", "12" and, for a depth block, "b3"."""
    if label in ("embedding", "final read"):
        return {"embedding": "emb.", "final read": "final"}[label]
    number = next((word for word in label.split() if word.isdecimal()), label)
    return f"b{number}" if label.startswith("depth block") else number
