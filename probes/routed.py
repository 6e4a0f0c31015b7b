"""Routed: where the weight goes in the very forward that is attributed, and what each read is made of."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from probes.effects import Effects


@dataclass(frozen=True)
class Routed:
    """`weight` and `share` [R, S], means over tokens, NaN where a read was not seen: the weight of a source, and the part
    w⟨v, h⟩/‖h‖² of what is read that it makes up. `final_share` [L+1]: that of source 0..L in the final state."""

    weight: np.ndarray
    share: np.ndarray
    final_share: np.ndarray
    sequences: int

    @classmethod
    @torch.no_grad()
    def seen(cls, effects: Effects) -> "Routed":
        gates = effects.gates
        layout, shape = gates.layout, gates.layout.triangle().shape
        found = cls(
            np.full(shape, np.nan),
            np.full(shape, np.nan),
            np.full(len(layout.layers) + 1, np.nan),
            effects.sequences,
        )
        counts = effects.counts

        def see(row: int, sources: list[Tensor], weights: list[Tensor] | None, state: Tensor) -> None:
            for place, source in enumerate(sources):
                weight = 1.0 if weights is None else weights[place]
                found.weight[row, place] = 1.0 if weights is None else _mean(weight, counts)
                found.share[row, place] = _mean(_share(weight, source, state), counts)
            if row == len(layout.reads) - 1:
                columns = {
                    n: s for s, each in enumerate(layout.sources) for n in range(each.first, each.last + 1)
                }
                for number, output in gates.outputs.items():
                    weight = 1.0 if weights is None else weights[columns[number]]
                    found.final_share[number] = _mean(_share(weight, output.view_as(state), state), counts)

        gates.watch = (
            None if gates.no_edges else see
        )  # where the states are other sums there are no such parts
        try:
            effects._base = effects.value()
        finally:
            gates.watch = None
        return found

    @classmethod
    def mean(cls, parts: list["Routed"]) -> "Routed":
        sizes = [part.sequences for part in parts]
        means = {
            each.name: np.average([getattr(part, each.name) for part in parts], axis=0, weights=sizes)
            for each in fields(cls)
            if each.name != "sequences"
        }
        return cls(**means, sequences=sum(sizes))


def _share(weight: Tensor | float, source: Tensor, state: Tensor) -> Tensor:
    """[B, T]"""
    source, state = source.float(), state.float()
    return (
        weight * (source * state).sum(-1) / state.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    )


def _mean(x: Tensor, counts: Tensor | None) -> float:
    """Over the tokens that count."""
    x = x.float()
    if counts is not None and counts.shape == x.shape:
        x = x[counts]
    return x.mean().item()
