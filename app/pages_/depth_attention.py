"""Depth attention: which layers does a layer read?"""

import pandas as pd
import streamlit as st

from app import draw, findings, frames, links, over_depth, pick, room, words
from app.charts.profile import profile
from app.charts.triangle import triangle
from probes.vocabulary import metric

WEIGHT, CONTRIBUTION, ENTROPY = "depth_weight", "contribution_rms", "depth_entropy"
KINDS = {"all": "All reads", "attention": "Attention", "mlp": "MLP"}
MEASURES = (WEIGHT, "depth_weight_std", CONTRIBUTION, ENTROPY, "depth_entropy_of_mean", "query_norm")


def body(shown: list[room.Shown]) -> None:
    reading = [one for one in shown if WEIGHT in one.run]
    picture, controls = st.container(), st.container()
    _without(shown)
    if not reading:
        room.explain(MEASURES)
        return
    chosen = pick.pair([one.name for one in reading], where=controls)
    pair = [one for one in reading if one.name in chosen]
    step = pick.step([one.run for one in pair], [WEIGHT], where=controls)
    left, right = controls.columns(2, gap="medium")
    kind = pick.choice("reads", "Reads", KINDS, where=left)
    names = [name for name in (WEIGHT, CONTRIBUTION) if any(name in one.run for one in pair)] or [WEIGHT]
    name = pick.choice("show", "Measure", {n: metric(n).title for n in names}, where=right)
    if step is None:
        picture.info("Choose a run to see who reads whom.")
        return
    with picture:
        _triangles(pair, name, kind, step)
    _entropy(pair, kind, step)
    room.explain(MEASURES)


def _triangles(pair: list[room.Shown], name: str, kind: str, step: int) -> None:
    cells = {one.name: frames.cells(one.run, step, kind) for one in pair}
    domain = _domain(pd.concat(cells.values()), name)
    if len(pair) == 1:
        (one,) = pair
        wide, narrow = st.columns([8, 5], gap="large")
        with wide:
            _triangle(one, cells[one.name], name, domain)
        with narrow:
            _links(one, name, kind, step)
    else:
        for column, one in zip(st.columns(2, gap="medium"), pair, strict=True):
            with column:
                _triangle(one, cells[one.name], name, domain)
                _links(one, name, kind, step)
    used = {one.name: int(cells[one.name]["step"].iloc[0]) for one in pair if len(cells[one.name])}
    note = over_depth.nearest(used, step)
    late = [name for name, frame in cells.items() if frame.empty]
    if late:
        note += f" Nothing was recorded up to step {words.step(step)} in {words.joined(late)}."
    if note.strip():
        st.caption(words.plain(note.strip()))


def _triangle(one: room.Shown, cells: pd.DataFrame, name: str, domain: tuple[float, float]) -> None:
    if cells.empty:
        return
    if not cells[name].notna().any():
        st.info(f"{words.plain(one.name)} has no {metric(name).title.lower()} at this step.")
        return
    told = findings.routing if name == WEIGHT else findings.contributions
    chart = triangle(cells, name, told(cells, one.name), domain)
    draw.show(chart, key=f"triangle {name} {one.name}", data=cells)


def _links(one: room.Shown, name: str, kind: str, step: int) -> None:
    strong = links.strongest(one.run, step, name, kind)
    st.markdown("**Strongest links**, the newest source left out")
    if not strong:
        st.caption("No source stands out from an even average yet.")
    st.markdown("\n".join(f"1. {words.plain(link.sentence(name))}" for link in strong))
    if strong:
        st.caption("In order of how far a source stands above the average source of its read.")


def _domain(cells: pd.DataFrame, name: str) -> tuple[float, float]:
    """Zero to the largest value where a read has a choice: reads of one or two sources would flatten the rest."""
    wide = cells[cells["row"] > 1] if len(cells) else cells
    top = float((wide if len(wide) else cells)[name].max()) if len(cells) else 1.0
    return 0.0, top if top > 0 else 1.0


def _entropy(pair: list[room.Shown], kind: str, step: int) -> None:
    have = room.recorded(pair, ENTROPY)
    parts = [_of_kind(frames.profile(one.run, one.name, ENTROPY, step), one, kind) for one in have]
    parts = [part for part in parts if part["value"].notna().any()]
    if not parts:
        return
    frame = pd.concat(parts, ignore_index=True)
    st.subheader("Which reads have made up their mind?", anchor=False)
    chart = profile(frame, ENTROPY, room.colours(have), findings.decisiveness(frame)).properties(height=220)
    draw.show(chart, key="entropy", data=frame)


def _of_kind(frame: pd.DataFrame, one: room.Shown, kind: str) -> pd.DataFrame:
    kinds = [read.kind for read in one.run.reads]
    keep = [kind == "all" or kinds[int(depth) - 1] in (kind, "final") for depth in frame["depth"]]
    return frame[keep]


def _without(shown: list[room.Shown]) -> None:
    """One sentence for the runs that have no depth weights, and why."""
    plain = [one.name for one in shown if WEIGHT not in one.run and not one.attnres]
    young = [one.name for one in shown if WEIGHT not in one.run and one.attnres]
    if plain:
        st.info(
            f"{words.joined(map(words.plain, plain))} has a plain residual: it adds every earlier output with weight "
            "one, so there is nothing learned to show here.",
            icon=":material/info:",
        )
    if young:
        st.info(
            f"{words.joined(map(words.plain, young))} has recorded no depth weights (`{WEIGHT}`) yet.",
            icon=":material/info:",
        )


room.enter(
    "Which layers does a layer read?",
    "Each row is one read, each column a source; colour is the share of the read that comes from it.",
    body,
)
