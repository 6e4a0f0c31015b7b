"""Depth attention: which layers does a layer read?"""

import pandas as pd
import streamlit as st

from app import draw, findings, focus, frames, links, over_depth, pick, reads, room, words
from app.charts.lines import lines
from app.charts.profile import profile
from app.charts.triangle import SHOWN, triangle
from probes.vocabulary import metric

WEIGHT, CONTRIBUTION, ENTROPY = "depth_weight", "contribution_rms", "depth_entropy"
KINDS = {"all": "All reads", "apart": "Attention and MLP apart", "attention": "Attention", "mlp": "MLP"}
APART = ("attention", "mlp")
READS = {"attention": "attention reads", "mlp": "MLP reads"}
LINKS = (
    "Click one to look at it closely. The newest source is left out; first comes what stands furthest above its "
    "read’s average."
)
MEASURES = (WEIGHT, "depth_weight_std", CONTRIBUTION, ENTROPY, "depth_entropy_of_mean", "query_norm")


def body(shown: list[room.Shown]) -> None:
    reading = [one for one in shown if WEIGHT in one.run]
    picture, player, controls = st.container(), st.container(key="player"), st.container()
    if reading:
        chosen = pick.pair([one.name for one in reading], where=controls)
        pair = [one for one in reading if one.name in chosen]
        step = pick.step([one.run for one in pair], [WEIGHT], where=player)
        left, right = controls.columns(2, gap="medium")
        kind = pick.choice("reads", "Reads", KINDS, where=left)
        names = [name for name in (WEIGHT, CONTRIBUTION) if any(name in one.run for one in pair)] or [WEIGHT]
        name = pick.choice("show", "Measure", {n: metric(n).title for n in names}, where=right)
        if step is None:
            picture.info("Choose one or two of the runs to see who reads whom.")
        else:
            _who_reads_whom(picture, pair, name, kind, step)
            both = "all" if kind == "apart" else kind
            _routing(pair, both, step)
            _entropy(pair, both, step)
    _without(shown)
    room.explain(MEASURES, reads.MEANING)


def _who_reads_whom(picture, pair: list[room.Shown], name: str, kind: str, step: int) -> None:
    """Triangles side by side, each run's links, and what was clicked. One triangle alone has its links beside it."""
    panels = [(one, part) for one in pair for part in (APART if kind == "apart" else (kind,))]
    cells = {panel: frames.cells(panel[0].run, step, panel[1]) for panel in panels}
    domain = _domain(pd.concat(cells.values()), name)
    alone = len(panels) == 1
    for start in range(0, len(panels), 2):
        columns = picture.columns([8, 5] if alone else 2, gap="medium")
        for panel, column in zip(panels[start : start + 2], columns, strict=False):
            with column:
                _triangle(*panel, cells[panel], name, domain)
        if alone:
            with columns[1]:
                _links(pair[0], name, kind, step, count=10)
    _notes(picture, {one.name: cells[one, part] for one, part in panels}, step)
    for panel in panels:
        if panel[0].name not in [other[0].name for other in panels[: panels.index(panel)]]:
            focus.show(panel[0], frames.cells(panel[0].run, step), name)
    if not alone:
        for one, place in zip(pair, st.columns(2, gap="medium"), strict=False):
            with place:
                _links(one, name, "all" if kind == "apart" else kind, step, count=6)


def _notes(picture, cells: dict[str, pd.DataFrame], step: int) -> None:
    note = over_depth.nearest({name: int(c["step"].iloc[0]) for name, c in cells.items() if len(c)}, step)
    late = [name for name, frame in cells.items() if frame.empty]
    if late:
        note += f" Nothing was recorded up to step {words.step(step)} in {words.joined(late)}."
    if note.strip():
        picture.caption(words.plain(note.strip()))


def _triangle(
    one: room.Shown, kind: str, cells: pd.DataFrame, name: str, domain: tuple[float, float]
) -> None:
    if cells.empty:
        return
    if not cells[name].notna().any():
        st.info(f"{words.plain(one.name)} has no {words.small(metric(name).title)} at this step.")
        return
    told = findings.routing if name == WEIGHT else findings.contributions
    label = one.name if kind == "all" else f"{one.name}, {READS[kind]}"
    draw.show(
        triangle(cells, name, told(cells, label), domain, focus.chosen(one)),
        key=f"triangle {name} {kind} {one.name}",
        data=cells,
        frames=_playback(one, cells, kind),
        fields=("number", "source"),
        on_click=lambda told: focus.choose(one, told),
    )


def _playback(one: room.Shown, cells: pd.DataFrame, kind: str) -> draw.Frames:
    known = [name for name in SHOWN if cells[name].notna().any()]
    stops = frames.played(frames.stops([one.run], [WEIGHT]), len(known) * len(cells))
    return draw.Frames(stops, {name: frames.cell_frames(one.run, name, stops, kind) for name in known})


def _links(one: room.Shown, name: str, kind: str, step: int, count: int) -> None:
    strong = links.strongest(one.run, step, name, kind, count)
    st.markdown(f"**Strongest links in {words.plain(one.name)}**", help=LINKS)
    if not strong:
        st.caption("No source stands out from an even average.")
        return
    with st.container(gap="xxsmall"):
        for link in strong:
            st.button(
                words.plain(link.sentence(name)),
                key=f"link {one.name} {link.row} {link.column}",
                type="tertiary",
                on_click=focus.choose,
                args=(one, {"number": link.row, "source": link.column}),
            )
    told = reads.roles(one.run, step, kind)
    if told and name == WEIGHT:
        st.caption(words.plain(told.sentence()))


def _domain(cells: pd.DataFrame, name: str) -> tuple[float, float]:
    """Zero to the largest value where a read has three sources or more: one or two would flatten the rest."""
    if cells.empty:
        return 0.0, 1.0
    wide = cells[cells["sources"] > 2]
    top = float((wide if len(wide) else cells)[name].max())
    return 0.0, top if top > 0 else 1.0


def _routing(pair: list[room.Shown], kind: str, step: int) -> None:
    """How local the reads are, over training."""
    frame = pd.concat([reads.over_training(one.run, one.name, kind) for one in pair], ignore_index=True)
    if frame.empty:
        return
    st.subheader("How far back do they look?", anchor=False)
    names = list(reads.MEASURES)
    for start in (0, 2):
        for name, place in zip(names[start : start + 2], st.columns(2, gap="medium"), strict=True):
            label = f"{reads.MEASURES[name]} ({reads.UNITS[name]})"
            with place:
                chart = lines(
                    frame, name, label, room.colours(pair), reads.finding(frame, name), zero=True, height=210
                )
                draw.show(chart, key=f"reads {name}", data=frame)


def _entropy(pair: list[room.Shown], kind: str, step: int) -> None:
    have = room.recorded(pair, ENTROPY)
    parts = [_of_kind(frames.profile(one.run, one.name, ENTROPY, step), one, kind) for one in have]
    parts = [part for part in parts if part["value"].notna().any()]
    if not parts:
        return
    frame = pd.concat(parts, ignore_index=True)
    st.subheader("Which reads have made up their mind?", anchor=False)
    chart = profile(frame, ENTROPY, room.colours(have), findings.decisiveness(frame), height=280)
    draw.show(chart, key="entropy", data=frame)


def _of_kind(frame: pd.DataFrame, one: room.Shown, kind: str) -> pd.DataFrame:
    kinds = [read.kind for read in one.run.reads]
    return frame[[kind == "all" or kinds[int(depth) - 1] in (kind, "final") for depth in frame["depth"]]]


def _without(shown: list[room.Shown]) -> None:
    """One sentence for the runs that have no depth weights, and why."""
    plain = [words.plain(one.name) for one in shown if WEIGHT not in one.run and not one.attnres]
    young = [words.plain(one.name) for one in shown if WEIGHT not in one.run and one.attnres]
    if plain:
        has, it = (
            ("has a plain residual", "it adds") if len(plain) == 1 else ("have plain residuals", "they add")
        )
        told = f"{it} every earlier output with weight one, so there is nothing learned to show here."
        st.info(f"**{words.joined(plain)}** {has}: {told}", icon=":material/info:")
    if young:
        has = "has" if len(young) == 1 else "have"
        st.info(
            f"**{words.joined(young)}** {has} recorded no depth weights (`{WEIGHT}`) yet.",
            icon=":material/info:",
        )


room.enter(
    "Which layers does a layer read?",
    "Each row is one read, each column a source; colour tells how much of the read comes from that source.",
    body,
)
