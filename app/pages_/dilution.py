"""Dilution: does the residual stream drown what each layer adds?"""

import pandas as pd
import streamlit as st

from app import draw, findings, fits, frames, over_depth, pick, reading, room, words
from app.charts import palette
from app.charts.growth import growth
from app.charts.lines import lines as curves
from app.derived import FINAL_SHARE, has
from probes.vocabulary import metric

HIDDEN, OUTPUT = "hidden_rms", "output_rms"
MEASURES = (HIDDEN, OUTPUT, "block_rms")


def body(shown: list[room.Shown]) -> None:
    picture, (player, scales) = st.container(), pick.bar(3)
    step = pick.step([one.run for one in shown], [HIDDEN, OUTPUT], player)
    scale = pick.one("depth_scale", "Scale", {"linear": "Linear", "log": "Logarithmic"}, where=scales)
    with picture:
        for column, name in zip(
            st.columns(2, gap="medium", vertical_alignment="bottom"), (HIDDEN, OUTPUT), strict=True
        ):
            with column:
                over_depth.profiles(
                    shown, name, step, scale, findings.growth, fill=palette.filling(470, 230, 480)
                )
        if step is not None:
            _doubling(shown, step)
    _growth(shown, step)
    _composition(shown, step)
    names = [name for name in MEASURES if any(name in one.run for one in shown)]
    if names:
        st.subheader("How did it get there?", anchor=False)
        heatmaps = st.container()
        name = pick.choice("depth", "Measure", {name: metric(name).title for name in names})
        with heatmaps:
            over_depth.heatmaps(shown, name)
    shared = [FINAL_SHARE, "mixing_share"] if any(has(one.run, FINAL_SHARE) for one in shown) else []
    room.explain([*MEASURES, *shared], f"{fits.MEANING} {findings.COUNTED}")


def _doubling(shown: list[room.Shown], step: int) -> None:
    have = [one for one in shown if HIDDEN in one.run]
    parts = [part for one in have if len(part := frames.profile(one.run, one.name, HIDDEN, step))]
    told = findings.doubling(pd.concat(parts, ignore_index=True)) if parts else ""
    if told:
        st.caption(words.plain(words.replaced(told, st.session_state.get(draw.SHORT, {}))))


def _growth(shown: list[room.Shown], step: int | None) -> None:
    """The growth exponent: its fit at this step, and its course over training."""
    have = [one for one in shown if HIDDEN in one.run]
    parts = [frames.profile(one.run, one.name, HIDDEN, step) for one in have] if step is not None else []
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    st.subheader("How fast does it grow with depth?", anchor=False)
    frame = pd.concat(parts, ignore_index=True)
    lines = fits.fitted(frame)
    left, right = st.columns(2, gap="medium", vertical_alignment="bottom" if len(lines) else "top")
    with left:
        if len(lines):
            chart = growth(frame, lines, HIDDEN, room.colours(have), fits.finding(lines, HIDDEN))
            draw.show(chart, key="growth", data=frame)
        else:
            st.caption(
                f"At step {words.step(step)} fewer than three states are finite: there is nothing to fit."
            )
    with right:
        course = pd.concat([fits.over_training(one.run, one.name, HIDDEN) for one in have], ignore_index=True)
        last = course.dropna(subset=["exponent"]).groupby("run", sort=False)["exponent"].last()
        told = words.joined(f"{value:.2f} in {run}" for run, value in last.items())
        when = _when(course, "exponent")
        title = f"Growth exponent {when}: {told}" if told else "Growth exponent: nothing to fit"
        chart = curves(
            course, "exponent", "Growth exponent", room.colours(have), title, zero=True, height=300
        )
        draw.show(chart, key="growth course", data=course)
        if told := reading.looked_at((one.run for one in have), HIDDEN, frames.POINTS):
            st.caption(told)


def _when(course: pd.DataFrame, column: str) -> str:
    """Of which step the last values of all runs are."""
    known = course.dropna(subset=[column]).groupby("run", sort=False)["step"].last()
    last = course.groupby("run", sort=False)["step"].last()
    return "at the last step" if known.equals(last) else "at the last step that is finite"


def _composition(shown: list[room.Shown], step: int | None) -> None:
    """What the final state is made of: each source's share at this step, the embedding's course, and all of it over
    training."""
    have = [one for one in shown if has(one.run, FINAL_SHARE)]
    if not have or step is None:
        return
    st.subheader("What is the final state made of?", anchor=False)
    blank = [one for one in have if not frames.over_training(one.run, FINAL_SHARE)["value"].notna().any()]
    if blank:
        sources = words.joined(f"the {len(one.run.layers) + 1} sources of {one.name}" for one in blank)
        st.caption(
            words.plain(
                f"It cannot be told of {sources}: recovered shares take a width of at least four times as many, and sources "
                "that are not alike."
            )
        )
    have = [one for one in have if one not in blank]
    if not have:
        return
    drawn = any(frames.profile(one.run, one.name, FINAL_SHARE, step)["value"].notna().any() for one in have)
    left, right = st.columns(2, gap="medium", vertical_alignment="bottom" if drawn else "top")
    with left:
        over_depth.profiles(have, FINAL_SHARE, step, "linear", findings.composition)
    with right:
        parts = [frames.of_source(one.run, one.name, FINAL_SHARE, 0) for one in have]
        course = pd.concat(parts, ignore_index=True)
        told = words.joined(
            f"{value:.1%} in {run}"
            for run, value in course.groupby("run", sort=False)["value"].last().items()
        )
        chart = curves(
            course,
            "value",
            "Share of the embedding",
            room.colours(have),
            f"The embedding’s share of the final state {_when(course, 'value')}: {told}",
            zero=True,
        )
        draw.show(chart, key="embedding share", data=course)
    over_depth.heatmaps(have, FINAL_SHARE)


room.enter(
    "Does the stream drown what each layer adds?",
    "A plain residual adds every output to one growing state: a later layer must shout to be heard.",
    body,
)
