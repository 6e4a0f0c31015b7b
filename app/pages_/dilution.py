"""Dilution: does the residual stream drown what each layer adds?"""

import streamlit as st

from app import findings, over_depth, pick, room
from probes.vocabulary import metric

HIDDEN, OUTPUT = "hidden_rms", "output_rms"
MEASURES = (HIDDEN, OUTPUT, "block_rms")


def body(shown: list[room.Shown]) -> None:
    picture = st.container()
    step = pick.step([one.run for one in shown], [HIDDEN, OUTPUT])
    scale = pick.choice("depth_scale", "Scale", {"linear": "Linear", "log": "Logarithmic"})
    with picture:
        for column, name in zip(
            st.columns(2, gap="medium", vertical_alignment="bottom"), (HIDDEN, OUTPUT), strict=True
        ):
            with column:
                over_depth.profiles(shown, name, step, scale, findings.growth)
    names = [name for name in MEASURES if any(name in one.run for one in shown)]
    if names:
        st.subheader("How did it get there?", anchor=False)
        heatmaps = st.container()
        name = pick.choice("depth", "Measure", {name: metric(name).title for name in names})
        with heatmaps:
            over_depth.heatmaps(shown, name)
    room.explain(MEASURES)


room.enter(
    "Does the stream drown what each layer adds?",
    "A plain residual adds every output to one growing state: a later layer must shout to be heard.",
    body,
)
