"""Depth attention: which layers does a layer read?"""

import numpy as np
import pandas as pd
import streamlit as st

from app import (
    cells,
    draw,
    findings,
    focus,
    frames,
    links,
    over_depth,
    pick,
    reading,
    reads,
    room,
    view,
    words,
)
from app.charts.lines import lines
from app.charts.profile import profile
from app.charts.readership import readership
from app.charts.triangle import triangle
from probes.vocabulary import metric

WEIGHT, ENTROPY = "depth_weight", "depth_entropy"
KINDS = {"all": "All reads", "apart": "Attention and MLP apart", "attention": "Attention", "mlp": "MLP"}
APART = ("attention", "mlp")
READS = {"attention": "attention reads", "mlp": "MLP reads"}
TITLES = {
    "depth_weight": "Weight",
    "contribution_rms": "Contribution",
    "mixing_weight": "Recovered mixing",
    "mixing_share": "Share",
    "depth_attribution": "Attribution",
}
LINKS = (
    "Click one to look at it closely. The newest source is left out; first comes what stands furthest above its "
    "read’s average."
)
WIDE = 64  # a triangle of more sources has the page's width to itself
EXPLAINED = (
    "depth_weight", "depth_weight_std", "contribution_rms", "mixing_weight", "mixing_share", "mixing_r2",
    "mixing_condition", "depth_attribution", "depth_entropy", "depth_entropy_of_mean", "query_norm",
)  # fmt: skip


def body(shown: list[room.Shown]) -> None:
    able = [one for one in shown if any(name in one.run for name in cells.PICTURES)]
    if able:
        picture, (player, measures, kinds), below = st.container(), pick.bar(4, 4), st.container()
        able.sort(key=lambda one: WEIGHT not in one.run)
        chosen = pick.pair([one.name for one in able], where=below)
        pair = [one for one in able if one.name in chosen]
        kind = pick.one("reads", "Reads", KINDS, where=kinds)
        known = [name for name in cells.PICTURES if any(name in one.run for one in pair)] or [WEIGHT]
        name = pick.one("show", "Measure", {n: TITLES[n] for n in known}, where=measures)
        drawn = {one: _stands_in(one, name) for one in pair}
        step = pick.step(
            [one.run for one in pair], list(dict.fromkeys(filter(None, drawn.values()))), where=player
        )
        if step is None:
            picture.info("Choose one or two of the runs to see who reads whom.")
        else:
            _who_reads_whom(picture, drawn, name, kind, step)
            both = "all" if kind == "apart" else kind
            _readership(drawn, both, step)
            _routing(drawn, both)
            _entropy(pair, both, step)
    _without([one for one in shown if WEIGHT not in one.run], able)
    room.explain([name for name in EXPLAINED if any(name in one.run for one in shown)], reads.MEANING)


def _stands_in(one: room.Shown, name: str) -> str | None:
    """The metric drawn for a run: the chosen one, or its recovered mixing where nothing chooses weights."""
    return next((n for n in (name, *cells.RECOVERED) if n in one.run), None)


def _who_reads_whom(picture, drawn: dict[room.Shown, str | None], name: str, kind: str, step: int) -> None:
    """Triangles side by side, each run's links, and what was clicked. One triangle alone has its links beside it."""
    for one in [one for one, own in drawn.items() if own is None]:
        picture.info(f"{words.plain(one.name)} did not record {words.small(metric(name).title)} (`{name}`).")
    drawn = {one: own for one, own in drawn.items() if own}
    _forget_source(drawn)
    panels = [(one, part) for one in drawn for part in (APART if kind == "apart" else (kind,))]
    frame = {(one, part): cells.cells(one.run, step, drawn[one], part) for one, part in panels}
    wide = any(len(cells.columns(one.run, own)) > WIDE for one, own in drawn.items())
    alone = len(panels) == 1
    across = 1 if alone and wide else 2
    note = _notes({one: frame[one, part] for one, part in panels}, drawn, name, step)
    for start in range(0, len(panels), across):
        columns = picture.columns(
            [9, 5] if alone and not wide else across,
            gap="medium",
            vertical_alignment="top" if alone else "bottom",
        )
        for (one, part), column in zip(panels[start : start + across], columns, strict=False):
            with column:
                domain = _domain(frame, drawn, drawn[one])
                _triangle(one, part, frame[one, part], drawn[one], domain, bool(note))
        if alone and not wide:
            with columns[1]:
                _links(panels[0][0], drawn[panels[0][0]], kind, step, count=9)
    if note:
        picture.caption(words.plain(note))
    for one, own in drawn.items():
        focus.show(one, cells.cells(one.run, step, own), own)
    if not alone or wide:
        for one, place in zip(drawn, st.columns(2, gap="medium"), strict=False):
            with place:
                _links(one, drawn[one], "all" if kind == "apart" else kind, step, count=6)


def _forget_source(drawn: dict[room.Shown, str]) -> None:
    """A column in focus is another source where recovered mixing has more columns than the reads have sources."""
    family, before = view.current().show in cells.RECOVERED, st.session_state.get("columns drawn")
    st.session_state["columns drawn"] = family
    if before in (None, family):
        return
    if any(
        one.name == view.current().focus and len(one.run.sources) != len(one.run.layout.outputs)
        for one in drawn
    ):
        view.change(source=None)


def _notes(shown: dict[room.Shown, pd.DataFrame], drawn: dict[room.Shown, str], name: str, step: int) -> str:
    """What stands below the triangles: other steps than the chosen, other measures, and how far they can be believed."""
    told = [
        over_depth.nearest({one.name: int(c["step"].iloc[0]) for one, c in shown.items() if len(c)}, step)
    ]
    late = [one.name for one, frame in shown.items() if frame.empty]
    if late:
        told.append(f"Nothing was recorded up to step {words.step(step)} in {words.joined(late)}.")
    for one, frame in shown.items():
        own = drawn[one]
        if own != name:
            told.append(
                f"{one.name} chooses no weights: its {words.small(metric(own).title)} is shown instead."
            )
        if own in cells.RECOVERED and len(frame):
            told.append(_trusted(one, frame, own))
    return " ".join(part for part in told if part)


def _trusted(one: room.Shown, frame: pd.DataFrame, name: str) -> str:
    """How far recovered mixing can be believed."""
    told = ""
    if cells.R2 in frame and frame[cells.R2].notna().any():
        worst = frame.loc[frame[cells.R2].idxmin()]
        part = "all" if worst[cells.R2] > 0.9995 else f"at least {worst[cells.R2]:.1%}"
        seen = frame[frame[cells.R2].notna()]["read"].nunique() == frame["read"].nunique()
        states = "every state" if seen else "every state that could be solved"
        told = f"In {one.name} the sources explain {part} of {states}."
    blank = int(frame[name].isna().sum())
    if blank:
        told += f" {blank} of {len(frame)} cells are striped: they could not be told apart from the tokens sampled."
    return told.strip()


def _triangle(
    one: room.Shown, kind: str, frame: pd.DataFrame, own: str, domain: tuple[float, float], noted: bool
) -> None:
    if frame.empty:
        return
    if not frame[own].notna().any():
        st.info(f"{words.plain(one.name)} has no {words.small(metric(own).title)} at this step.")
        return
    label = one.name if kind == "all" else f"{one.name}, {READS[kind]}"
    stops = frames.played(frames.stops([one.run], [own]), len(frame))
    draw.show(
        triangle(
            frame,
            own,
            findings.picture(frame, label, own),
            domain,
            focus.chosen(one, own),
            below=40 if noted else 0,
        ),
        key=f"triangle {own} {kind} {one.name}",
        data=frame,
        frames=draw.Frames(stops, {own: cells.played(one.run, own, stops, kind)}),
        fields=("number", "source"),
        on_click=lambda told: focus.choose(one, told),
    )


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


def _domain(
    shown: dict[tuple[room.Shown, str], pd.DataFrame], drawn: dict[room.Shown, str], name: str
) -> tuple[float, float]:
    """What the colours of a metric span in all triangles that show it, from reads of three sources or more: one or
    two sources would flatten the rest."""
    parts = [frame for (one, _), frame in shown.items() if drawn[one] == name and len(frame)]
    if not parts:
        return 0.0, 1.0
    frame = pd.concat([part[["sources", name]] for part in parts])
    wide = frame[frame["sources"] > 2]
    return cells.span((wide if len(wide) else frame)[name].to_numpy(float))


def _readership(drawn: dict[room.Shown, str | None], kind: str, step: int) -> None:
    """What every source gets from its readers, and the names of those that everybody or nobody reads."""
    tables = {
        one: reads.readership(one.run, step, kind, name)
        for one, name in drawn.items()
        if name in reads.SHARES
    }
    tables = {one: table for one, table in tables.items() if len(table)}
    if not tables:
        return
    st.subheader("Who is read by everybody, who by nobody?", anchor=False)
    for (one, table), place in zip(
        tables.items(), st.columns(2 if len(tables) > 1 else 1, gap="medium"), strict=False
    ):
        table = table.assign(short=table["from"].map(words.short))
        told = f"{one.name}: {reads.named(table).sentence()}"
        with place:
            draw.show(
                readership(table, told, (reads.BALLAST, reads.SINK)),
                key=f"readership {one.name}",
                data=table,
                fields=("source",),
                on_click=lambda told, one=one: focus.choose(one, told),
            )


def _routing(drawn: dict[room.Shown, str | None], kind: str) -> None:
    """How local the reads are, over training."""
    have = {one: name for one, name in drawn.items() if name in reads.SHARES}
    have |= {one: WEIGHT for one in drawn if one not in have and WEIGHT in one.run}
    parts = [reads.over_training(one.run, one.name, kind, name) for one, name in have.items()]
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    frame = pd.concat(parts, ignore_index=True)
    st.subheader("How far back do they look?", anchor=False)
    longest = max(have.items(), key=lambda pair: len(reading.steps(pair[0].run, pair[1])))
    if told := reading.looked_at([longest[0].run], longest[1], reads.MATRICES, False):
        st.caption(told)
    titles = reads.SHARED if "mixing_share" in have.values() else reads.MEASURES
    names = [name for name in reads.MEASURES if np.isfinite(frame[name].to_numpy(float)).any()]
    for start in range(0, len(names), 2):
        for name, place in zip(names[start : start + 2], st.columns(2, gap="medium"), strict=False):
            label = f"{titles[name]} ({reads.UNITS[name]})"
            with place:
                chart = lines(
                    frame,
                    name,
                    label,
                    room.colours(list(have)),
                    reads.finding(frame, name, titles),
                    zero=True,
                    height=210,
                )
                draw.show(chart, key=f"reads {name}", data=frame)


def _entropy(pair: list[room.Shown], kind: str, step: int) -> None:
    have = [one for one in pair if ENTROPY in one.run]
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


def _without(shown: list[room.Shown], able: list[room.Shown]) -> None:
    """One sentence for the runs without depth weights that have nothing else to show either, and why."""
    plain = [words.plain(one.name) for one in shown if not one.attnres and one not in able]
    young = [words.plain(one.name) for one in shown if one.attnres]
    if plain:
        has, it = (
            ("has a plain residual", "it adds") if len(plain) == 1 else ("have plain residuals", "they add")
        )
        told = (
            f"{it} every earlier output with weight one, so there is nothing learned to show here. Of a run that "
            "recorded its recovered mixing (`mixing_share`), this page shows what each state is made of."
        )
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
