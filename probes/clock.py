"""Which step is it: optimizer steps completed, of one optimizer or of several that step together.

A fused optimizer under a GradScaler decides on the device whether it skips its update, and its hooks run either
way. So steps are counted as attempts on the host and as skips on the device; the host learns of skips when
numbers arrive in the writer's thread, and rows are given their true step there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probes.scaling import found_inf


@dataclass(frozen=True)
class Moment:
    """A step as the host knows it: `attempt`, less the `skips` before it (int [] on the device; None: none)."""

    attempt: int
    skips: Tensor | None


class Clock:
    """Counts from step `first` on. With `attempts`, attempts are what `step` tells: those are the same in all processes at all
    times, where each learns of skips when it does."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], first: int = 0, attempts: bool = False):
        self._attempts = attempts
        self._optimizers = optimizers
        self._stepped: dict[int, Tensor | None] = {}  # of this step: who, and whether in vain
        self._attempt = first
        self._skips: Tensor | None = None
        self._known_skips = 0
        self._before = self.now

    @property
    def now(self) -> Moment:
        return Moment(self._attempt, self._skips)

    @property
    def before(self) -> Moment:
        """The step before; at the beginning the first."""
        return self._before

    @property
    def step(self) -> int:
        """Steps completed, as far as is known."""
        return self._attempt if self._attempts else self._attempt - self._known_skips

    def again(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer has stepped already in this step: then another one begins."""
        return id(optimizer) in self._stepped

    def stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        """One optimizer has stepped; whether the step is complete: every optimizer has."""
        self._stepped[id(optimizer)] = found_inf(optimizer)
        return len(self._stepped) == len(self._optimizers)

    def vain(self) -> Tensor | None:
        """Whether this step's update was skipped on the device, [] 0 or 1; None: the host knows it was not."""
        found = list(self._stepped.values())
        if not found or any(skip is None for skip in found):
            return None
        return torch.stack(found).min()

    def advance(self) -> None:
        """The step is complete."""
        self._before = self.now
        vain = self.vain()
        if vain is not None:
            # A new tensor, so that older moments keep theirs.
            self._skips = vain if self._skips is None else self._skips + vain
        self._stepped.clear()
        self._attempt += 1

    def learn(self, skips: int) -> None:
        """Numbers have arrived that say so many steps were skipped until then."""
        self._known_skips = max(self._known_skips, skips)

    def known_at(self, attempt: int) -> int:
        """The least step that an attempt can have been, as far as is known."""
        return attempt - self._known_skips
