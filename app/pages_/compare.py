"""Compare: how do two runs, or two steps of one, differ?"""

import pandas as pd
import streamlit as st

from app import cells, difference, draw, findings, frames, match, pick, room, words
from app.charts import difference as charts
from app.charts import palette
from app.charts.profile import profile
from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE, metric

DEPTH = (STATE, OUTPUT, LAYER, READ, BLOCK)
ALIKE = 1e-3  # of the largest: a difference that is none
ROOM = palette.filling(580, 210, 420)  # both charts at the top
LIKED = ("hidden_rms", "output_rms", "output_grad_rms", "param_grad_norm")


def body(shown: list[room.Shown]) -> None:
    if not shown:
        return
    left, right, matched = st.columns([2, 2, 5], gap="medium")
    picture, (player, measures, scales) = st.container(), pick.bar(4, 3)
    names = {one.name: one.name for one in shown}
    a = _named(shown, pick.one("first", "First", names, where=left))
    ahead = {name: name for name in [*list(names)[1:], *list(names)[:1]]}
    b = _named(shown, pick.one("second", "Second", ahead, where=right))
    way = pick.choice("by", "Matched by", match.ways(a.run, b.run), where=matched, help=match.MEANING)
    known = [n for n in sorted(a.run.metrics) if n in b.run and metric(n).axes in DEPTH]
    known.sort(key=lambda n: (n not in LIKED, LIKED.index(n) if n in LIKED else 0))
    if not known:
        picture.info("These two have recorded no common measure over depth yet.")
        return
    name = pick.one("compared", "Measure", {n: metric(n).title for n in known}, where=measures)
    scale = pick.one("compare_scale", "Scale", {"linear": "Linear", "log": "Logarithmic"}, where=scales)
    step = pick.asked([a.run], [name], where=player)
    other = None
    if way == "own":
        label = f"Against step of {b.name}" if a is b else f"Step of {b.name}"
        other = pick.number("other", label, b.run.last_step, 0 if a is b else None, where=matched)
    at = match.pair(a.run, b.run, way, step, other, (a.name, b.name))
    with picture:
        told = words.replaced(at.told, st.session_state.get(draw.SHORT, {}))
        st.markdown(f":material/balance: {words.plain(told)}")
        left, right = st.columns(2, gap="medium", vertical_alignment="bottom")
        with left:
            _overlaid(a, b, name, at, scale)
        with right:
            _grid(a, b, name, "step" if way == "own" else way, at)
    _weights(a, b, at)
    st.subheader("In numbers", anchor=False)
    st.dataframe(
        difference.table(a.run, b.run, at, (a.name, b.name)),
        hide_index=True,
        width="stretch",
        height="content",
    )
    room.explain([name], match.MEANING + " Runs of other depths are aligned by relative depth.")


def _overlaid(a: room.Shown, b: room.Shown, name: str, at: match.Pair, scale: str) -> None:
    labels, colours = (a.name, b.name), {a.name: a.colour, b.name: b.colour}
    if a is b:
        labels = (f"{a.name}, step {words.step(at.first)}", f"{a.name}, step {words.step(at.second)} ")
        colours = {labels[0]: a.colour, labels[1]: next(c for c in palette.RUNS if c != a.colour)}
    parts = [
        frames.profile(one.run, label, name, step)
        for one, label, step in ((a, labels[0], at.first), (b, labels[1], at.second))
    ]
    even = len(a.run.layers) == len(b.run.layers)
    if not even:
        parts = [difference.relative(part, one.run, name) for part, one in zip(parts, (a, b), strict=True)]
    parts = [part for part in parts if len(part)]
    if not parts:
        st.caption("Neither recorded this at the compared steps.")
        return
    frame = pd.concat(parts, ignore_index=True)
    draw.show(
        profile(
            frame, name, colours, findings.side_by_side(frame, name), scale, relative=not even, fill=ROOM
        ),
        key=f"compared {name}",
        data=frame,
    )


def _grid(a: room.Shown, b: room.Shown, name: str, way: str, at: match.Pair) -> None:
    """How the two differ over training; of one run, how it differs from its own second step."""
    if a is b:
        frame = difference.since(a.run, name, at.second)
        against = f"Against step {words.step(at.second)}"
        title = f"{metric(name).title} of {a.name} over training, {words.small(against)}"
    else:
        frame = difference.grid(a.run, b.run, name, way)
        against = f"In {b.name}"
        title = difference.finding(frame, name, (a.name, b.name))
    if not frame["value"].notna().any():
        st.caption("There is no matched step at which both recorded this.")
        return
    draw.show(
        charts.over_training(frame, name, against, title, fill=ROOM), key=f"difference {name}", data=frame
    )


def _weights(a: room.Shown, b: room.Shown, at: match.Pair) -> None:
    """Who reads whom, one less the other."""
    first, second = (a.run, at.first), (b.run, at.second)
    labels, legend = (f"in {a.name}", f"in {b.name}"), f"in {b.name}"
    if a is b:  # how it has changed since the other step
        first, second = second, first
        labels = tuple(f"at step {words.step(step)}" for _, step in (first, second))
        legend = f"than {labels[0]}"
    found = {
        name: difference.cells(first[0], second[0], first[1], second[1], name)
        for name in cells.PICTURES
        if name in a.run and name in b.run
    }
    found = {name: frame for name, frame in found.items() if len(frame) and frame["difference"].notna().any()}
    if not found:
        return
    st.subheader("Do they read otherwise?", anchor=False)
    picture = st.container()
    name = pick.choice("matrix", "Matrix", {n: metric(n).title for n in found})
    frame = found[name]
    largest = frame[["first", "second"]].abs().max().max()
    if frame["difference"].abs().max() <= ALIKE * largest:  # rounding has no pattern worth a look
        picture.caption(
            f"{metric(name).title} is the same {labels[0]} and {labels[1]}, to a thousandth of the largest."
        )
        return
    most, *others = difference.changes(frame, name, labels, 9)
    left, right = picture.columns([9, 5], gap="medium")
    with left:
        title = f"{metric(name).title} differs most where {words.small(most)}"
        draw.show(charts.weights(frame, labels, legend, title), key="difference weights", data=frame)
        if _of_other_shape(a, b, name):
            st.caption(
                "The two have other reads or sources: the finer one’s are put together by relative depth."
            )
    with right:
        st.markdown("**Further differences**")
        st.markdown("\n".join(f"- {words.plain(other)}" for other in others))


def _of_other_shape(a: room.Shown, b: room.Shown, name: str) -> bool:
    return cells.columns(a.run, name) != cells.columns(b.run, name) or len(a.run.reads) != len(b.run.reads)


def _named(shown: list[room.Shown], name: str) -> room.Shown:
    return next(one for one in shown if one.name == name)


room.enter(
    "How do two runs differ?",
    "Two runs at the same loss, step, tokens or time, or one run at two steps: profiles, differences and numbers.",
    body,
)
