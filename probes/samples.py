"""Samples of tokens on their way: from the taps to the writer's thread, which makes metrics of them."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from probes.faults import Faults
from probes.sampled import SAMPLED_METRICS, of_sample
from probes.selfcheck import SelfCheck
from probes.sites import Sites
from probes.taps import Taps

_WAITING = 2**28  # bytes of samples that may wait for the writer's thread


class Samples:
    """The samples of a recording: `handed` to the writer's thread, and `taken_up` by it."""

    def __init__(self, sites: Sites, faults: Faults, selfcheck: SelfCheck):
        self._sites, self._faults, self._selfcheck = sites, faults, selfcheck
        self.handed = self.taken_up = 0

    def of(self, taps: Taps, step: int) -> dict[str, Tensor]:
        """The sample of this step; nothing where its metrics cannot be made, or not in time."""
        if self._faults.now & set(SAMPLED_METRICS):
            return {}
        sampled = taps.sampled()
        waiting = (self.handed - self.taken_up) * sum(value.nbytes for value in sampled.values())
        if waiting > _WAITING:
            late = {"step": step, "cause": "samples before were not solved yet"}
            for name in SAMPLED_METRICS:
                self._faults.missing.setdefault(name, late)
            return {}
        return sampled

    def solved(self, sample: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """The metrics (name, value) of a sample that is on the host; a failure costs these and nothing else."""
        if not sample:
            return
        with self._faults.guard(*SAMPLED_METRICS):
            solved = of_sample(sample, self._sites.layout, [site.given for site in self._sites.layers])
            self._selfcheck.mixing(solved)
            yield from solved.items()
