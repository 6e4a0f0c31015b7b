"""The table of runs: every run of the folders, how it is, and a tick for those that are shown."""

import math
from datetime import UTC, datetime

import pandas as pd
import streamlit as st

from app import opener, pick, room, settings, view, words
from app.opener import Entry
from probes import RunError

_KEY, _ROWS = "runs table", "runs in the table"
_DOT = "●"
_TOLD = 160  # characters of a configuration


def show(shown: list[room.Shown]) -> None:
    """The table, newest first, kept to what the search finds; ticked rows are the chosen runs."""
    entries = [entry for entry in room.entries() if not entry.problem]
    kept, _ = pick.matching(entries, view.current().search)
    there = [entry for entry in reversed(entries) if entry.name in kept]
    st.subheader("All runs here", anchor=False)
    if len(there) < len(entries):
        st.caption(f"{len(there):,} of {len(entries):,} runs: the search leaves out the others.")
    frame = rows(there)
    if frame.empty:
        return
    chosen = [one.name for one in shown]
    colours = room.colours(shown)
    frame.insert(0, _DOT, [_DOT if name in colours else "" for name in frame["Run"]])
    names = st.session_state[_ROWS] = list(frame["Run"])
    ticked = sorted(names.index(name) for name in chosen if name in names)
    selection = {"selection": {"rows": ticked, "columns": [], "cells": []}}
    # A table that is drawn for the first time takes its default more surely than a state.
    if _KEY in st.session_state and st.session_state[_KEY]["selection"]["rows"] != ticked:
        st.session_state[_KEY] = selection
    styled = frame.style.apply(
        lambda _: [f"color: {colours[name]}" if name in colours else "" for name in names], subset=[_DOT]
    )
    st.dataframe(
        styled,
        key=_KEY,
        hide_index=True,
        width="stretch",
        column_config=_columns(),
        placeholder="–",
        on_select=_tick,
        selection_mode="multi-row",
        selection_default=selection,
    )


def rows(entries: list[Entry]) -> pd.DataFrame:
    """One row a run, with what a glance tells; runs deleted meanwhile are left out."""
    found, configs = [], []
    for entry in entries:
        try:
            run, now = opener.unread(entry), opener.glanced(entry)
        except RunError:
            continue
        configs.append(run.config)
        found.append(
            {
                "Run": entry.name,
                "Status": now.status,
                "Last step": now.last_step if now.last_step >= 0 else math.nan,
                "Loss": math.nan if now.loss is None else now.loss,
                "Residual": entry.residual or None,
                "Layers": len(run.layers),
                "Parameters": run.manifest.versions.get("parameters", math.nan),
                "Started": run.created,
                "Ended": None if now.status == "running" else datetime.fromtimestamp(now.since, UTC),
                "Why": words.capital(now.reason.strip()) if now.status == "stopped" else "",
                "Size": words.size(now.size),
                "Tags": ", ".join(entry.tags),
            }
        )
    frame = pd.DataFrame(found)
    if frame.empty:
        return frame
    differing = settings.together(configs)
    differing.pop("residual", None)
    told = [
        ", ".join(f"{entry} {values[i]}" for entry, values in differing.items()) for i in range(len(found))
    ]
    frame["Configuration"] = [text if len(text) <= _TOLD else f"{text[:_TOLD]} …" for text in told]
    frame["Parameters"] = pd.to_numeric(frame["Parameters"], errors="coerce")
    return frame.drop(
        columns=[c for c in ("Residual", "Why", "Tags", "Configuration", "Parameters") if not _any(frame[c])]
    )


def _any(column: pd.Series) -> bool:
    return bool(column.notna().any() and (column != "").any())


def _columns() -> dict:
    moment, count = st.column_config.DatetimeColumn, st.column_config.NumberColumn
    return {
        _DOT: st.column_config.TextColumn("", width=30, help="The colour of a chosen run on every page."),
        "Run": st.column_config.TextColumn(pinned=True),
        "Started": moment(format="distance"),
        "Ended": moment(format="distance", help="The end, or the last sign of life."),
        "Why": st.column_config.TextColumn(width="medium", help="Why a run stopped."),
        "Last step": count(format="localized"),
        "Loss": count(format="%.3f", help="The last logged training loss."),
        "Residual": st.column_config.TextColumn(help="The entry `residual` of the run's configuration."),
        "Parameters": count(format="compact"),
        "Size": st.column_config.TextColumn(help="Of the run's files."),
        "Configuration": st.column_config.TextColumn(
            width="large", help="The entries that are not the same in all runs of this table."
        ),
    }


def _tick() -> None:
    """Choose the ticked rows, in the order in which they were chosen, and no more than a chart can keep apart."""
    ticked = [st.session_state[_ROWS][row] for row in st.session_state[_KEY]["selection"]["rows"]]
    before = view.current().runs
    # Runs that the search hides stay chosen.
    kept = [name for name in before if name in ticked or name not in st.session_state[_ROWS]]
    chosen = [*kept, *(name for name in ticked if name not in kept)][: pick.MOST]
    view.change(runs=tuple(chosen), pair=())
    room.again()
