"""Pickers: widgets that show a part of the view and change it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import streamlit as st

from app import browser, frames, opener, view, words
from app.opener import Entry
from probes import Run

FIRST = 3  # runs shown when nobody has chosen yet
MOST = 6  # runs whose lines stay apart in one chart
FEW = 8  # runs that are found without a search


def runs(entries: Sequence[Entry]) -> list[Entry]:
    """The runs to look at, picked in the sidebar; the newest of each residual until somebody chooses."""
    readable = {entry.name: entry for entry in entries if not entry.problem}
    found = search(list(readable.values()))
    asked = view.current().runs
    chosen = [name for name in asked if name in readable][:MOST]
    key = "pick runs"
    # Nothing asked is a first visit, or somebody who just emptied the box: only the box can tell them apart.
    if not asked and key not in st.session_state:
        chosen = [entry.name for entry in opener.worth_showing(list(readable.values()), FIRST)]
        view.change(runs=tuple(chosen))
    _set(key, chosen)
    st.multiselect(
        "Runs",
        [name for name in readable if name in found or name in chosen],
        key=key,
        max_selections=MOST,
        placeholder="Choose runs",
        on_change=lambda: view.change(runs=tuple(st.session_state[key]), pair=()),
    )
    lost = [name for name in asked if name not in readable]
    if lost:
        st.warning(f"The link names {words.joined(map(words.plain, lost))}: no such run is here.")
    return [readable[name] for name in chosen]


def search(entries: Sequence[Entry]) -> list[str]:
    """The names of the runs that the sidebar's regular expression finds: all while it is empty or not one."""
    key, asked = "pick search", view.current().search
    if len(entries) > FEW or asked:
        _set(key, asked)
        st.text_input(
            "Search",
            key=key,
            placeholder="Name or tag, e.g. full|block",
            help="A regular expression, for names, tags and residuals: the list below and the table of runs keep what "
            "it finds.",
            on_change=lambda: view.change(search=st.session_state[key]),
        )
    found, wrong = matching(entries, asked)
    if wrong:
        st.caption(f"Not a regular expression: {words.plain(wrong)}.")
    return found


def matching(entries: Iterable[Entry], pattern: str) -> tuple[list[str], str]:
    """The names of the runs whose name, residual or a tag has the pattern in it, in any case of letters, and what is
    wrong with the pattern."""
    try:
        finds = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        return [entry.name for entry in entries], str(error)
    return [
        entry.name for entry in entries if any(map(finds.search, (entry.name, entry.residual, *entry.tags)))
    ], ""


def bar(*wide: int) -> list:
    """The player's place and one for each control that belongs beside it, so `wide`: in sight wherever the page stands."""
    return st.container(key="player").columns([10, *wide], gap="medium", vertical_alignment="bottom")


def step(recorded: Sequence[Run], names: Sequence[str], where) -> int | None:
    """The step to look at: the latest until somebody moves the player, and again once it is at its end. `where` is the
    player's place."""
    stops = frames.stops(recorded, names)
    return at(stops, where) if stops else None


def at(stops: Sequence[int], where) -> int:
    """The stop to look at: the last one until somebody moves the player, which is put `where` it is told."""
    asked = view.current().step
    now = len(stops) - 1 if asked is None else frames.nearest(np.array(stops), asked) or 0
    if len(stops) == 1:
        where.caption(
            f"Only step {words.step(stops[0])} is recorded so far: a slider appears with the next one."
        )
        return stops[0]
    with where:
        browser.player(stops, now, key="pick step", on_step=lambda step: view.change(step=step))
    # Between stops (thinned, or a link's step) the asked step itself decides which recorded step is nearest.
    return stops[now] if asked is None else max(asked, stops[0])


def asked(recorded: Sequence[Run], names: Sequence[str], where) -> int | None:
    """The step somebody moved the player to; None while it follows the latest."""
    found = step(recorded, names, where)
    return None if view.current().step is None else found


def number(field: str, label: str, last: int, start: int | None = None, where=None) -> int:
    """A whole number from 0 to `last`; `start`, else `last`, until somebody chooses."""
    now = getattr(view.current(), field)
    key = f"pick {field}"
    _set(key, (last if start is None else start) if now is None else min(now, last))
    (where or st).number_input(
        label, 0, max(last, 0), key=key, on_change=lambda: view.change(**{field: st.session_state[key]})
    )
    return st.session_state[key]


def choice(field: str, label: str, options: Mapping[str, str], help: str | None = None, where=None) -> str:
    """One of a few named options, as buttons; an unknown one in a link falls back to the first."""
    return _named((where or st).segmented_control, field, label, options, help, required=True)


def one(field: str, label: str, options: Mapping[str, str], help: str | None = None, where=None) -> str:
    """One of many named options, as a list; an unknown one in a link falls back to the first."""
    return _named((where or st).selectbox, field, label, options, help)


def listed(key: str, label: str, options: Mapping, now, tell: Callable, where) -> None:
    """A list of named options that stands at `now`; `tell` hears what somebody chooses."""
    key = f"pick {key}"
    _set(key, now)
    where.selectbox(
        label,
        list(options),
        key=key,
        format_func=lambda option: options.get(option, ""),
        on_change=lambda: st.session_state[key] in options and tell(st.session_state[key]),
    )


def _named(widget, field: str, label: str, options: Mapping[str, str], help: str | None, **more) -> str:
    asked = getattr(view.current(), field)
    key = f"pick {field}"
    _set(key, asked if asked in options else next(iter(options)))
    widget(
        label,
        list(options),
        key=key,
        format_func=lambda option: options[option],
        help=help,
        # Nothing at all may come back while a page is being replaced.
        on_change=lambda: st.session_state[key] in options and view.change(**{field: st.session_state[key]}),
        **more,
    )
    return st.session_state[key]


def pair(names: Sequence[str], where=None) -> list[str]:
    """At most two of the names, side by side; the first two until somebody chooses."""
    if len(names) <= 2:
        return list(names)
    asked = [name for name in view.current().pair if name in names][:2]
    key = "pick pair"
    _set(key, asked or list(names[:2]))
    (where or st).multiselect(
        "Side by side",
        list(names),
        key=key,
        max_selections=2,
        on_change=lambda: view.change(pair=tuple(st.session_state[key])),
    )
    return st.session_state[key]


def turn(page: str) -> None:
    """Call when a page opens: the widgets of the page before are gone, so nothing shows anything yet."""
    if st.session_state.get("page") != page:
        st.session_state["page"] = page
        for key in [
            key
            for key in st.session_state
            if str(key).startswith("pick ") and key not in ("pick runs", "pick search")
        ]:
            del st.session_state[key]


def _set(key: str, value) -> None:
    """Show `value` in a widget; one that shows it already is left alone: a hand may be on it."""
    if st.session_state.get(key) != value:
        st.session_state[key] = value
