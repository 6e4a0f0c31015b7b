"""Gradients: does every layer learn at the same pace?"""

import pandas as pd
import streamlit as st

from app import draw, findings, frames, over_depth, pick, room
from app.charts.lines import lines
from probes.vocabulary import metric

MEASURES = ("output_grad_rms", "param_grad_norm", "block_grad_rms", "hidden_grad_rms")
INCOMPARABLE = ("block_grad_rms", "hidden_grad_rms")


def body(shown: list[room.Shown]) -> None:
    names = [name for name in MEASURES if any(name in one.run for one in shown)] or [MEASURES[0]]
    picture, player = st.container(), st.container(key="player")
    controls = st.columns([3, 1], gap="medium")
    name = pick.choice(
        "gradient",
        "Measure",
        {n: metric(n).title + (" (not comparable)" if n in INCOMPARABLE else "") for n in names},
        where=controls[0],
        help="Output gradients mean the same in every architecture; gradients of states do not.",
    )
    scale = pick.choice(
        "gradient_scale", "Scale", {"log": "Logarithmic", "linear": "Linear"}, where=controls[1]
    )
    step = pick.step([one.run for one in shown], [name], where=player)
    with picture:
        if name in INCOMPARABLE:
            st.warning(
                f"{metric(name).title} is not comparable between residual types: compare runs by the output "
                "gradient, and read this one within a run.",
                icon=":material/warning:",
            )
        over_depth.profiles(shown, name, step, scale, findings.unevenness)
    have = [one for one in shown if name in one.run]
    if have and step is not None:
        st.subheader("Does it even out while it trains?", anchor=False)
        _evenness(have, name)
        over_depth.heatmaps(have, name)
    room.explain(
        names,
        "CV is the standard deviation over layers divided by their mean; max/min divides the largest by the "
        "smallest. Both leave the embedding out.",
    )


def _evenness(have: list[room.Shown], name: str) -> None:
    frame = pd.concat([frames.evenness(one.run, one.name, name) for one in have], ignore_index=True)
    columns = {"cv": "CV over depth (standard deviation / mean)", "ratio": "Max/min over depth"}
    for place, (column, label) in zip(
        st.columns(2, gap="medium", vertical_alignment="bottom"), columns.items(), strict=True
    ):
        with place:
            scale = "log" if column == "ratio" else "linear"
            title = findings.evenness(frame, column)
            chart = lines(
                frame, column, label, room.colours(have), title, scale, zero=column == "cv", height=290
            )
            draw.show(chart, key=f"{column} {name}", data=frame)


room.enter(
    "Does every layer get a gradient?",
    "A gradient that differs much between layers lets some learn fast and others hardly at all.",
    body,
)
