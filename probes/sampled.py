"""The metrics of a sample of tokens: from what was kept on the device (sample.py) to what is written, on the host.

It runs in the writer's thread.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from probes.layout import Layout
from probes.mixing import MIXING_METRICS, recover
from probes.vocabulary import MIXING

OUTLIER_METRICS = ("hidden_max", "hidden_kurtosis", "output_cosine")
SAMPLED_METRICS = (*MIXING_METRICS, *OUTLIER_METRICS)


def of_sample(
    sampled: Mapping[str, np.ndarray], layout: Layout, given: Sequence[int]
) -> dict[str, np.ndarray]:
    """Every metric of a sample, by name, triangles packed; those of which nothing is known are left out.

    `given` is the number of sources that the state of each layer may read; the final state may read all.
    """
    of_states, of_outputs = sampled["about"]
    tokens, width = (int(n) for n in of_states[:, :2].max(0))
    if not tokens * width:
        return {}
    shape = len(of_states), tokens, width
    states, outputs = (sampled[name][:, : tokens * width].reshape(shape) for name in ("states", "outputs"))
    # What has another size is not of the same tokens.
    states[(of_states[:, :2] != (tokens, width)).any(1)] = np.nan
    outputs[(of_outputs[:, :2] != (tokens, width)).any(1)] = np.nan
    found = recover(states, outputs, np.array([*given, len(states)]), of_states[:, 2])
    found |= outliers(states, outputs)
    packed = {name: layout.pack(value, MIXING) if value.ndim == 2 else value for name, value in found.items()}
    return {name: value for name, value in packed.items() if not np.isnan(value).all()}


def outliers(states: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """hidden_max and hidden_kurtosis [L+1] of `states` [L+1, T, D], over tokens that are finite throughout, and
    output_cosine [L], the mean over tokens of the angle between each layer's state and its output. NaN for what was not
    seen."""
    whole = (np.isfinite(states) | np.isnan(states).all((1, 2), keepdims=True)).all((0, 2))
    states, outputs = states[:, whole].astype(np.float64), outputs[1:, whole].astype(np.float64)
    if not states.size:
        return {}
    squares = states * states
    lengths = np.sqrt(squares[:-1].sum(2) * np.einsum("ltd,ltd->lt", outputs, outputs))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "hidden_max": np.sqrt(squares.max((1, 2))),
            "hidden_kurtosis": (squares * squares).mean((1, 2)) / squares.mean((1, 2)) ** 2,
            "output_cosine": (np.einsum("ltd,ltd->lt", states[:-1], outputs) / lengths).mean(1),
        }
