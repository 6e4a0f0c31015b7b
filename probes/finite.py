"""Where values stop being finite: the first layer, in the order of the forward. Needs no torch."""

from collections.abc import Sequence

import numpy as np

from probes.layout import Layer, Layout


def first_place(layout: Layout, states: Sequence[bool], outputs: Sequence[bool]) -> str:
    """Name of the first place of a forward that is not finite, of `states` [L+1] and `outputs` [L+1]; empty where all
    are."""
    for place, layer in enumerate([None, *layout.layers]):
        if outputs[place]:
            return "embedding" if layer is None else f"output of {named(layout, layer)}"
        if states[place]:
            if place == len(layout.layers):
                return "final state"
            return f"state into {named(layout, layout.layers[place])}"
    return ""


def named(layout: Layout, layer: Layer) -> str:
    """ "layer 7 (MLP of transformer block 4)"."""
    block = f"transformer block {layer.block}"
    alone = sum(each.block == layer.block for each in layout.layers) == 1
    kind = {"mlp": "MLP", "layer": ""}.get(layer.kind, layer.kind)
    return f"layer {layer.index} ({block if alone or not kind else f'{kind} of {block}'})"


def not_finite(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Which of the RMS `values` are not finite although their places were seen."""
    return ~np.isfinite(values) & (np.asarray(seen) > 0)
