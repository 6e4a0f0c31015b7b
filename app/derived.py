"""Derived: quantities that the app computes from recorded metrics. They have names, units and meanings as metrics do."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probes import Run, vocabulary
from probes.vocabulary import OUTPUT, Metric


@dataclass(frozen=True)
class Derived:
    """A row of the vocabulary, the recorded metric it comes from, and how: [N, ...] to [N, ...]."""

    metric: Metric
    source: str
    take: Callable[[np.ndarray], np.ndarray]


FINAL_SHARE = "final_share"
DERIVED = {
    FINAL_SHARE: Derived(
        Metric(
            FINAL_SHARE,
            OUTPUT,
            "Share of the final state",
            "",
            "What each source makes up of the final state: the last row of the mixing share. The shares sum to one; "
            "a negative one works against the state.",
        ),
        "mixing_share",
        lambda values: values[:, -1, :],
    )
}


def metric(name: str) -> Metric:
    """The vocabulary's entry of a metric, or of a derived one."""
    if name == vocabulary.TOKEN_WEIGHT.name:  # recorded apart from the metrics
        return vocabulary.TOKEN_WEIGHT
    return DERIVED[name].metric if name in DERIVED else vocabulary.metric(name)


def has(run: Run, name: str) -> bool:
    """Whether a run recorded a metric, or what it is derived from."""
    return (DERIVED[name].source if name in DERIVED else name) in run
