"""Taps of states and outputs that no module shows: computed from tensors that hooks see (recipes.py)."""

from collections.abc import Callable

import torch
from torch import Tensor

from probes.sites import Made, Sites


class MadeTaps:
    """Hangs on the `taps` of a model (taps.py) what its computed tensors are made of; `forget` ends a forward. They are
    values without a graph: of their gradients nothing is seen."""

    def __init__(self, sites: Sites, taps):
        self._sites, self._taps = sites, taps
        self._kept: dict[tuple[int, int], Tensor] = {}  # by number of what is computed, and of its leaf

    def attach(self) -> None:
        number = 0
        for row, site in enumerate(self._sites.layers):
            for made, action in (
                (site.state_made, lambda x, row=row: self._taps.made_state(x, row)),
                (site.output_made, lambda x, row=row: self._taps.values(x, "output", row + 1)),
            ):
                if made is not None:
                    self._hang(number, made, action)
                    number += 1

    def forget(self) -> None:
        self._kept.clear()

    def _hang(self, number: int, made: Made, action: Callable[[Tensor], None]) -> None:
        *others, last = made.leaves
        for place, leaf in enumerate(others):
            self._taps.at(leaf, lambda x, key=(number, place): self._keep(key, x))
        self._taps.at(last, lambda x: self._compute(number, made, x, action))

    def _keep(self, key: tuple[int, int], x: object) -> None:
        if isinstance(x, Tensor) and (torch.compiler.is_compiling() or not self._taps.recomputing):
            self._kept[key] = x.detach()

    def _compute(self, number: int, made: Made, x: object, action: Callable[[Tensor], None]) -> None:
        keys = [(number, place) for place in range(len(made.leaves) - 1)]
        if not isinstance(x, Tensor) or not all(key in self._kept for key in keys):
            return
        if torch.compiler.is_compiling() or not self._taps.recomputing:
            action(made.value([*(self._kept.pop(key) for key in keys), x.detach()]))
