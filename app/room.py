"""What all pages share: a question, the picked runs, refreshing, and words for what is missing."""

import html
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import streamlit as st
from altair.utils import schemapi

from app import draw, explained, menu, notices, opener, pick, words
from app.charts import palette
from app.derived import has, metric
from app.opener import Entry
from app.places import led_away
from app.snapshot import Snapshot
from probes import RunError, elsewhere, remote

LIVE_SECONDS = 1.5
IDLE_SECONDS = 5.0

_FOUND, _PICKED, _COLOURS, _AGAIN = "entries", "picked entries", "run colours", "runs chosen on a page"


@dataclass(frozen=True)
class Shown:
    """A picked run: its name and colour on every page."""

    name: str
    colour: str
    run: Snapshot

    @property
    def attnres(self) -> bool:
        """Whether its layers choose their sources; told by what was recorded, else by the configuration."""
        return "depth_weight" in self.run or self.run.config.get("residual") in ("full", "block")


def sidebar() -> None:
    """Find the runs and let somebody pick; call in every full run of the script, before the page."""
    entries = opener.find(opener.folders())
    st.session_state[_FOUND] = entries
    with st.sidebar:
        picked = st.session_state[_PICKED] = pick.runs(entries) if any(not e.problem for e in entries) else []
        _marks(_shades(entries, picked).values())


def enter(question: str, answer: str, body: Callable[[list[Shown]], None], watch: bool = False) -> None:
    """A page: its question, one line of answer, and `body` for the picked runs, again while one of them runs.

    `watch` keeps looking for new runs even when none is running.
    """
    pick.turn(question)
    st.title(question, anchor=False)
    st.markdown(f":gray[{answer}]")
    entries, picked = st.session_state[_FOUND], st.session_state[_PICKED]
    live = any(shown.run.status == "running" for shown in _open(entries, picked))
    seconds = LIVE_SECONDS if live else IDLE_SECONDS if watch or not entries or remote.troubles() else None

    @st.fragment(run_every=seconds)
    def page() -> None:
        menu.show()
        if st.session_state.pop(_AGAIN, False):
            st.rerun()
        if seconds and [e.name for e in opener.find(opener.folders())] != [e.name for e in entries]:
            st.rerun()
        shown = _open(entries, picked)
        for sentence in remote.troubles():
            stale = "What was fetched before is shown as it was then; depthscope keeps asking."
            st.warning(words.plain(f"{sentence} {stale}"), icon=":material/cloud_off:")
        st.session_state[draw.SHORT] = words.shortened([one.name for one in shown])
        if live and not any(one.run.status == "running" for one in shown):
            st.rerun()
        if not any(not entry.problem for entry in entries):
            _welcome(entries)
            return
        _state(shown)
        for one in shown:
            _notices(one)
        if not shown:
            st.info("No run is chosen: pick one or more in the sidebar.")
        # Checking every chart against Vega-Lite's schema takes half of a page's time; the tests check them.
        with schemapi.debug_mode(False):
            body(shown)
        _problems(entries)

    page()


def again() -> None:
    """Call when the page itself chose other runs: the sidebar is to know."""
    st.session_state[_AGAIN] = True


def entries() -> list[Entry]:
    """Every run found when the page was opened."""
    return st.session_state[_FOUND]


def colours(shown: Sequence[Shown]) -> dict[str, str]:
    return {one.name: one.colour for one in shown}


def recorded(shown: Sequence[Shown], name: str) -> list[Shown]:
    """The runs that recorded a metric; a sentence on the page for the others."""
    have = [one for one in shown if one.name and has(one.run, name)]
    what = f"{words.small(metric(name).title)} (`{name}`)"
    for running, verb, then in (
        (True, "has not recorded", " yet: the first numbers come within seconds of the first step"),
        (False, "did not record", ""),
    ):
        lack = [
            one.name for one in shown if not has(one.run, name) and (one.run.status == "running") == running
        ]
        if lack:
            who = words.joined(f"**{words.plain(one)}**" for one in lack)
            st.caption(f"{who} {verb} {what}{then}.")
    return have


def explain(names: Sequence[str], extra: str = "") -> None:
    """What each metric on the page means, its equation and how to read it."""
    with st.expander("What is measured here", icon=":material/help:"):
        for name in names:
            st.markdown(explained.told(name))
        st.markdown(explained.SYMBOLS)
        st.markdown(
            "A *layer* is one sublayer, attention or MLP; a *transformer block* is the pair; a *depth block* "
            "is one of Block AttnRes. Source 0 is the token embedding, source *i* the output of layer *i*. "
            + extra
        )


def _shades(entries: Sequence[Entry], picked: Sequence[Entry]) -> dict[str, str]:
    """A colour for each picked run, which it keeps for the whole visit, whatever else is chosen."""
    everyone = [entry.name for entry in entries]
    shades = palette.assign(everyone, [entry.name for entry in picked], st.session_state.get(_COLOURS))
    st.session_state[_COLOURS] = st.session_state.get(_COLOURS, {}) | shades
    return shades


def _marks(colours: Iterable[str]) -> None:
    """The colours of the picked runs, beside their names in the sidebar."""
    rules = (
        f".stSidebar [data-tag-index='{i}']{{border-left:.35rem solid {colour}}}"
        for i, colour in enumerate(colours)
    )
    st.html(f"<style>{''.join(rules)}</style>")


def _open(entries: Sequence[Entry], picked: Sequence[Entry]) -> list[Shown]:
    shades = _shades(entries, picked)
    shown = []
    for entry in picked:
        try:
            shown.append(Shown(entry.name, shades[entry.name], opener.opened(entry)))
        except RunError as error:
            st.warning(words.plain(str(error)))
    return shown


def _state(shown: Sequence[Shown]) -> None:
    """One chip a run: colour, name, how it is and how far."""
    chips = []
    for one in shown:
        last, status = one.run.last_step, one.run.status
        far = f"step {words.step(last)}" if last >= 0 else "nothing recorded" + " yet" * (status == "running")
        how = status
        if status == "stopped":
            how += f" {words.age(time.time() - one.run.last_seen.timestamp())} ago"
        dot = "border-radius:50%" if status == "running" else "border-radius:2px"
        chips.append(
            '<span style="display:inline-flex;align-items:center;gap:.45em;margin:0 1.4em .2em 0">'
            f'<span style="width:.75em;height:.75em;{dot};background:{one.colour}"></span>'
            f"<b>{html.escape(one.name)}</b> <span style='opacity:.65'>{how}, {far}</span></span>"
        )
    if chips:
        st.html(f'<div style="font-size:.9rem">{"".join(chips)}</div>')


def _notices(one: Shown) -> None:
    """What one should know of a run before its charts are believed."""
    doubts = [*one.run.problems, *notices.warnings(one.run)]
    if doubts:
        st.warning(f"**{words.plain(one.name)}**: {words.plain(' '.join(doubts))}", icon=":material/warning:")
    told = " ".join(notices.remarks(one.run))
    if one.run.status == "stopped":
        told = f"Stopped: {one.run.status_reason.rstrip('.') or 'no reason given'}. {told}"
    if told:
        st.caption(f"**{words.plain(one.name)}**: {words.plain(told)}")


def _problems(entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry.problem:
            st.warning(words.plain(entry.problem), icon=":material/warning:")


def _welcome(entries: Sequence[Entry]) -> None:
    """What an empty folder opens: how to record a first run."""
    places = opener.folders()
    missing = [elsewhere.shown(place) for place in places if not place.is_dir()]
    if missing:
        st.warning(
            f"There is no folder {words.joined(map(words.plain, missing))}.", icon=":material/warning:"
        )
    for sentence in filter(None, map(led_away, places)):
        st.warning(words.plain(sentence), icon=":material/warning:")
    where = words.joined((f"`{elsewhere.shown(place)}`" for place in places), "or") or "`runs`"
    folder = elsewhere.shown(places[0]) if places else "runs"
    st.subheader("No run is here yet", anchor=False)
    st.markdown(
        f"This page looks in {where} and opens the first run by itself. To watch three small models learn now, run "
        "`depthscope demo`. To record a training of yours, wrap it:"
    )
    st.code(
        f'''import probes

with probes.record(model, "{folder}/first", optimizer=optimizer) as recorder:
    for batch in batches:
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.log(loss=loss)''',
        language="python",
    )
    st.markdown("Each run is a folder of small files; the pages follow it while it trains.")
    for entry in entries:
        st.warning(words.plain(entry.problem), icon=":material/warning:")
