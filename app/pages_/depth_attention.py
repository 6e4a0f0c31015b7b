"""Depth attention: which layers does a layer read?"""

import pandas as pd
import streamlit as st

from app import draw, findings, frames, links, over_depth, pick, room, words
from app.charts.profile import profile
from app.charts.triangle import SHOWN, triangle
from probes.vocabulary import metric

WEIGHT, CONTRIBUTION, ENTROPY = "depth_weight", "contribution_rms", "depth_entropy"
KINDS = {"all": "All reads", "attention": "Attention", "mlp": "MLP"}
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
            _entropy(pair, kind, step)
    _without(shown)
    room.explain(MEASURES)


def _who_reads_whom(picture, pair: list[room.Shown], name: str, kind: str, step: int) -> None:
    """One run: its triangle with the links beside it. Two: triangles side by side, each over its links."""
    cells = {one: frames.cells(one.run, step, kind) for one in pair}
    domain = _domain(pd.concat(cells.values()), name)
    columns = picture.columns([8, 5] if len(pair) == 1 else 2, gap="medium")
    beside = columns[1:] if len(pair) == 1 else st.columns(2, gap="medium")
    for one, column, place in zip(pair, columns, beside, strict=False):
        with column:
            _triangle(one, cells[one], name, kind, domain)
        with place:
            _links(one, name, kind, step, count=10 if len(pair) == 1 else 6)
    note = over_depth.nearest({one.name: int(c["step"].iloc[0]) for one, c in cells.items() if len(c)}, step)
    late = [one.name for one, frame in cells.items() if frame.empty]
    if late:
        note += f" Nothing was recorded up to step {words.step(step)} in {words.joined(late)}."
    if note.strip():
        picture.caption(words.plain(note.strip()))


def _triangle(
    one: room.Shown, cells: pd.DataFrame, name: str, kind: str, domain: tuple[float, float]
) -> None:
    if cells.empty:
        return
    if not cells[name].notna().any():
        st.info(f"{words.plain(one.name)} has no {words.small(metric(name).title)} at this step.")
        return
    told = findings.routing if name == WEIGHT else findings.contributions
    draw.show(
        triangle(cells, name, told(cells, one.name), domain),
        key=f"triangle {name} {one.name}",
        data=cells,
        frames=_playback(one, cells, kind),
    )


def _playback(one: room.Shown, cells: pd.DataFrame, kind: str) -> draw.Frames:
    known = [name for name in SHOWN if cells[name].notna().any()]
    stops = frames.played(frames.stops([one.run], [WEIGHT]), len(known) * len(cells))
    return draw.Frames(stops, {name: frames.cell_frames(one.run, name, stops, kind) for name in known})


def _links(one: room.Shown, name: str, kind: str, step: int, count: int) -> None:
    strong = links.strongest(one.run, step, name, kind, count)
    st.markdown(f"**Strongest links in {words.plain(one.name)}**")
    if not strong:
        st.caption("No source stands out from an even average.")
        return
    st.markdown("\n".join(f"- {words.plain(link.sentence(name))}" for link in strong))
    st.caption("The newest source is left out; first comes what stands furthest above its read’s average.")


def _domain(cells: pd.DataFrame, name: str) -> tuple[float, float]:
    """Zero to the largest value where a read has three sources or more: one or two would flatten the rest."""
    if cells.empty:
        return 0.0, 1.0
    wide = cells[cells["sources"] > 2]
    top = float((wide if len(wide) else cells)[name].max())
    return 0.0, top if top > 0 else 1.0


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
