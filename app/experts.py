"""Experts: how evenly the layers with a mixture of experts spread their tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import streamlit as st

from app import draw, frames, over_depth, room, words
from app.charts.experts import layer_by_expert
from probes import Run

LOAD, BALANCE = "expert_load", "expert_balance"


def section(shown: Sequence[room.Shown], step: int) -> None:
    """The balance over depth and, of each run, who gets how much; nothing where no run recorded experts."""
    have = [one for one in shown if LOAD in one.run]
    if not have:
        return
    st.subheader("Do the experts share the work?", anchor=False)
    left, right = st.columns(2, gap="medium", vertical_alignment="bottom")
    with left:
        over_depth.profiles(have, BALANCE, step, "linear", evenness, everywhere=False)
    for place, one in enumerate(have):
        with right if place % 2 == 0 else left:
            frame = cells(one.run, step)
            if len(frame):
                draw.show(
                    layer_by_expert(frame, told(frame, one.name)), key=f"experts {one.name}", data=frame
                )
    over_depth.heatmaps(have, BALANCE)


def cells(run: Run, step: int) -> pd.DataFrame:
    """step, depth, place, expert (from 1), value, even: the load of each expert that exists; `even` is its fair share."""
    steps, values = frames.series(run, LOAD)
    index = frames.nearest(steps, step)
    if index is None:
        return pd.DataFrame(columns=["step", "depth", "place", "expert", "value", "even"])
    load = values[index]
    rows, experts = np.nonzero(~np.isnan(load))
    counts = (~np.isnan(load)).sum(axis=1)
    layers = run.layout.layers
    return pd.DataFrame(
        {
            "step": int(steps[index]),
            "depth": rows + 1,
            "place": [layers[row].label for row in rows],
            "expert": experts + 1,
            "value": load[rows, experts].astype(np.float64),
            "even": 1 / counts[rows],
        }
    )


def told(frame: pd.DataFrame, label: str) -> str:
    """Who gets most, beside an even share."""
    most = frame.loc[(frame["value"] / frame["even"]).idxmax()]
    idle = int((frame["value"] == 0).sum())
    none = f"; {idle} of {len(frame)} experts get nothing" if idle else ""
    return (
        f"{label}: expert {int(most['expert'])} of {most['place']} gets most, {words.factor(most['value'] / most['even'])} "
        f"an even share, at step {words.step(int(most['step']))}{none}"
    )


def evenness(frame: pd.DataFrame, name: str) -> str:
    """The least even layer of each run."""
    known = frame.dropna(subset=["value"])
    if known.empty:
        return "Expert balance: no experts were seen at this step"
    worst = known.loc[known.groupby("run", sort=False)["value"].idxmin()]
    parts = [
        f"{words.number(value)} in {place} of {run}"
        for run, place, value in zip(worst["run"], worst["place"], worst["value"], strict=True)
    ]
    return f"Least even: a balance of {words.joined(parts)}"
