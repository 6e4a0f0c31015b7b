"""Compare: how do two runs, or two steps of one, differ?"""

import pandas as pd
import streamlit as st

from app import difference, draw, frames, match, pick, room, words
from app.charts import difference as charts
from app.charts import palette
from app.charts.profile import profile
from probes.vocabulary import BLOCK, LAYER, OUTPUT, READ, STATE, metric

DEPTH = (STATE, OUTPUT, LAYER, READ, BLOCK)
LIKED = ("hidden_rms", "output_rms", "output_grad_rms", "param_grad_norm")


def body(shown: list[room.Shown]) -> None:
    if not shown:
        return
    picture, player, controls = st.container(), st.container(key="player"), st.container()
    left, right, matched = controls.columns([2, 2, 5], gap="medium")
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
    name = pick.one("compared", "Measure", {n: metric(n).title for n in known}, where=left)
    scale = pick.choice("compare_scale", "Scale", {"linear": "Linear", "log": "Logarithmic"}, where=right)
    step = pick.asked([a.run], [name], where=player)
    other = (
        pick.number("other", f"Step of {b.name}", b.run.last_step, where=matched) if way == "own" else None
    )
    at = match.pair(a.run, b.run, way, step, other, (a.name, b.name))
    with picture:
        st.markdown(f":material/balance: {words.plain(at.told)}")
        left, right = st.columns(2, gap="medium", vertical_alignment="bottom")
        with left:
            _overlaid(a, b, name, at, scale)
        with right:
            _grid(a, b, name, "step" if way == "own" else way)
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
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    steps = words.joined(words.step(step) for step in (at.first, at.second))
    title = f"{metric(name).title} over depth at step{'s' if at.first != at.second else ''} " + (
        steps if at.first != at.second else words.step(at.first)
    )
    draw.show(
        profile(frame, name, colours, title, scale, relative=not even, height=370),
        key=f"compared {name}",
        data=frame,
    )


def _grid(a: room.Shown, b: room.Shown, name: str, way: str) -> None:
    if a is b:
        st.caption("Choose two runs to see how they differ over training.")
        return
    frame = difference.grid(a.run, b.run, name, way)
    if not frame["value"].notna().any():
        st.caption("There is no matched step at which both recorded this.")
        return
    title = difference.finding(frame, name, (a.name, b.name))
    draw.show(charts.over_training(frame, name, b.name, title), key=f"difference {name}", data=frame)


def _weights(a: room.Shown, b: room.Shown, at: match.Pair) -> None:
    cells = difference.cells(a.run, b.run, at.first, at.second)
    if cells.empty:
        return
    most = cells.loc[cells["difference"].abs().idxmax()]
    title = f"The reads differ most where {most['read']} reads {most['from']}: {most['difference']:+.2f} in {b.name}"
    draw.show(charts.weights(cells, b.name, title), key="difference weights", data=cells)


def _named(shown: list[room.Shown], name: str) -> room.Shown:
    return next(one for one in shown if one.name == name)


room.enter(
    "How do two runs differ?",
    "Two runs at the same loss, step, tokens or time, or one run at two steps: profiles, differences and numbers.",
    body,
)
