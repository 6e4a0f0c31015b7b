"""Gradients: does every layer learn at the same pace?"""

import pandas as pd
import streamlit as st

from app import draw, experts, findings, frames, over_depth, pick, reading, room, words
from app.charts import axes, palette
from app.charts.lines import lines
from app.charts.profile import profile
from probes.vocabulary import metric

MEASURES = {
    "output_grad_rms": "Outputs",
    "param_grad_norm": "Parameters",
    "block_grad_rms": "Transformer blocks (not comparable)",
    "hidden_grad_rms": "States (not comparable)",
}


def body(shown: list[room.Shown]) -> None:
    names = [name for name in MEASURES if any(name in one.run for one in shown)] or [next(iter(MEASURES))]
    picture, (player, measures, scales) = st.container(), pick.bar(4, 3)
    name = pick.one(
        "gradient",
        "Gradient of",
        {n: MEASURES[n] for n in names},
        where=measures,
        help="Gradients of outputs and parameters mean the same in every architecture; those of states do not.",
    )
    scale = pick.one("gradient_scale", "Scale", {"log": "Logarithmic", "linear": "Linear"}, where=scales)
    step = pick.step([one.run for one in shown], [name], where=player)
    with picture:
        if name in axes.INCOMPARABLE:
            st.warning(
                f"{metric(name).title} is not comparable between residual types: compare runs by the output "
                "gradient, and read this one within a run.",
                icon=":material/warning:",
            )
        over_depth.profiles(
            shown, name, step, scale, findings.unevenness, fill=palette.filling(440, 230, 520)
        )
    have = [one for one in shown if name in one.run]
    if have and step is not None:
        st.subheader("Does it even out while it trains?", anchor=False)
        _evenness(have, name)
        over_depth.heatmaps(have, name)
    if step is not None:
        _updates(shown, step)
        experts.section(shown, step)
    sparse = [experts.LOAD, experts.BALANCE] if any(experts.LOAD in one.run for one in shown) else []
    moved = ["update_ratio"] if any("update_ratio" in one.run for one in shown) else []
    room.explain(
        [*names, *moved, *sparse],
        "CV is the standard deviation over layers divided by their mean; max/min divides the largest by the "
        "smallest; the Gini coefficient is 0 when all layers have the same and near 1 when one has everything. All three "
        "leave the embedding out.",
    )


def _evenness(have: list[room.Shown], name: str) -> None:
    frame = pd.concat([frames.evenness(one.run, one.name, name) for one in have], ignore_index=True)
    columns = {"cv": "CV over depth", "ratio": "Max/min over depth", "gini": "Gini over depth"}
    for place, (column, label) in zip(
        st.columns(3, gap="medium", vertical_alignment="bottom"), columns.items(), strict=True
    ):
        with place:
            scale = "log" if column == "ratio" else "linear"
            title = findings.evenness(frame, column)
            chart = lines(
                frame, column, label, room.colours(have), title, scale, zero=column != "ratio", height=290
            )
            draw.show(chart, key=f"{column} {name}", data=frame)
    if told := reading.looked_at((one.run for one in have), name, frames.POINTS):
        st.caption(told)


def _updates(shown: list[room.Shown], step: int) -> None:
    """How far a step would move each layer, for the runs that recorded what it takes."""
    parts = {one: frames.update_ratio(one.run, one.name, step) for one in shown}
    parts = {one: part for one, part in parts.items() if len(part)}
    if not parts:
        return
    st.subheader("How far does one step move a layer?", anchor=False)
    parts = over_depth.finite(parts, "update_ratio", step)
    if not parts:
        return
    frame = pd.concat(parts.values(), ignore_index=True)
    title = findings.unevenness(frame, "update_ratio")
    chart = profile(frame, "update_ratio", room.colours(list(parts)), title, "log", 280)
    draw.show(chart, key="update ratio", data=frame)
    derived = [one.name for one in parts if "update_ratio" not in one.run]
    told = []
    if len(derived) < len(parts):
        told.append(
            "What the optimizer's step changed in a layer, over the layer's size: an estimate, from a fixed sample of its "
            "elements."
        )
    if derived:
        of = f" of {words.joined(derived)}" if len(derived) < len(parts) else ""
        told.append(
            f"An estimate{of}: gradient norm × learning rate / parameter norm. It is exact for plain SGD without "
            "momentum or clipping; Adam rescales every gradient, so compare layers and runs by it, not its size."
        )
    st.caption(" ".join(told))


room.enter(
    "Does every layer get a gradient?",
    "A gradient that differs much between layers lets some learn fast and others hardly at all.",
    body,
)
