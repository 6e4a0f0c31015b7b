"""One recorded step of a model that several processes train: what adds up is summed over them, and rank 0 makes the metrics.

A step's sums are made of counts and of sums of squares, so those of all processes are those of the whole batch.
"""

import contextlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from probes.edges import EDGE_METRICS
from probes.flush import start_copy
from probes.gradients import GradientNorms
from probes.merging import Merging, Step, Sums
from probes.packing import packed, together, unpack
from probes.parallel import Parallel
from probes.processes import Agreed
from probes.sites import Sites
from probes.stages import Span, Spread, whole
from probes.tally import Tally
from probes.taps import MATRICES, Taps
from probes.updates import Updates, ratio_of
from probes.vocabulary import METRICS

_NAMES = tuple(METRICS)
_PATIENCE, _HASTE = 60.0, 5.0  # seconds to wait for other processes at the end
Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
Said = list[tuple[str, int, float]]  # scalars that another process has logged, with their steps
Done = Callable[[Found | None, Mapping[str, np.ndarray], str, Said], None]


class Together:
    """`hand` over a step on every process. `done(found, own, why, said)` is called, in a thread, when those of all are known:
    on rank 0 `found` are metrics, counts and sample, as `Tally.finish`, `.counts` and `.sampled` give them, elsewhere and
    where they cannot be known None; `why` then says the reason. `own` are the values that were given as `own`. `sites` are
    those of all layers, also where this process has but a stage of them. Where another process `speaks`, its scalars are
    `said` too."""

    def __init__(self, agreed: Agreed, parallel: Parallel, sites: Sites):
        self.parallel = parallel
        self.sites = whole(agreed.stages, sites) if agreed.stages else sites
        self._rank, self._world = agreed.rank, agreed.world
        self.staged = bool(agreed.stages)
        self.speaks = self._rank == agreed.speaker > 0
        self.merging = Merging(agreed)
        share = self.merging.senders
        self._spread = (
            Spread(sites, self.sites, Span.of(agreed.stages, agreed.holds[self._rank]), share)
            if self.staged
            else None
        )
        self._twin = Tally(self.sites, torch.device("cpu"), share) if agreed.rank == 0 else None
        self._elements = self._twin.sample.elements if self._twin is not None else 0
        self._waiting: deque[int] = (
            deque()
        )  # numbers of the steps that have been handed over and are not done
        self._done = -1
        self.faults: set[str] = set()  # metrics that could not be measured somewhere, in the step done last

    @property
    def settled(self) -> float:
        """The last step of which no more rows will come from here."""
        with contextlib.suppress(IndexError):
            return min(self._waiting[0], self._later) - 1
        return self._later - 1

    @property
    def _later(self) -> float:
        """The first step of which another process may still say something."""
        return self._done if self.staged else math.inf

    def hand(
        self,
        number: int,
        taps: Taps,
        gradients: GradientNorms,
        updates: Updates,
        faults: set[str],
        own: dict,
        done: Done,
        said: Sequence[tuple[str, int, float | Tensor]] = (),
    ) -> None:
        matrices = taps.mode == MATRICES
        tally = taps.tally
        tally.passes.settle()
        wrong = torch.tensor([float(name in faults) for name in _NAMES])
        sums = gradients.sums() | updates.sums(number)
        mine = gradients.shapes() | updates.shapes()
        shapes = mine if self._spread is None else self._spread.shapes(mine)
        parts = {"vectors": packed([*tally.sums(False), *_present(sums, mine), wrong.to(tally.device)])}
        if matrices:
            parts["matrices"] = packed(self._matrices(tally))
            if self.merging.sends:
                parts["sample"] = packed(tally.sample.tensors())
        divisor = self.parallel.divisor
        logged = {("said", i): x for i, (_, _, x) in enumerate(said) if isinstance(x, Tensor)}
        known = {("own", name): value for name, value in own.items()} | logged
        fetch = start_copy(parts | known, torch.float64)
        values: dict = {}

        def fetched() -> Sums:
            values.update(fetch())
            if self._spread is not None:
                values["vectors"] = self._spread.vectors(values["vectors"], mine, len(_NAMES))
                for name in ("matrices", "sample"):
                    if name in values:
                        values[name] = getattr(self._spread, name)(values[name])
            if self.speaks:
                rows = [
                    (name, step, float(values.get(("said", i), x))) for i, (name, step, x) in enumerate(said)
                ]
                values["said"] = np.frombuffer(json.dumps(rows).encode(), np.uint8).copy()
            return values

        def then(sums: Sums | None, why: str) -> None:
            own = {each[1]: value for each, value in values.items() if each[0] == "own"}
            try:
                if self._rank or sums is None:
                    done(None, own, why, [])
                else:
                    found = self._made(sums, shapes, matrices, tally, gradients, divisor, own.get("scale"))
                    done(found, own, "", json.loads(bytes(sums.get("said", b"")) or b"[]"))
            finally:
                self._done = self._waiting.popleft()

        nbytes = sum(8 * part.numel() for part in parts.values())
        self._waiting.append(number)
        self.merging.hand(Step(number, matrices, fetched, then, nbytes))

    def close(self, status: str) -> bool:
        """Whether all that was handed over has been summed."""
        return self.merging.close(_PATIENCE if status == "finished" else _HASTE)

    def _matrices(self, tally: Tally) -> list[Tensor]:
        nonfinite, *depth = tally.sums(True)
        # Of a state that several processes hold, each tells a share.
        shares = [1.0 if row in tally.split else 1 / self.parallel.copies for row in range(len(nonfinite))]
        told = nonfinite.double() * torch.tensor(shares, dtype=torch.float64).to(nonfinite.device)
        return [told, *depth, *(self._slots(error) for error in _errors(tally))]

    def _slots(self, mine: Tensor) -> Tensor:
        """A place for each process's own, for what does not add up."""
        slots = mine.new_zeros(self._world, *mine.shape)
        slots[self._rank] = mine
        return slots

    # On rank 0, when the sums of all have come

    def _made(
        self,
        sums: Sums,
        shapes: dict[str, tuple[int, ...]],
        matrices: bool,
        live: Tally,
        gradients: GradientNorms,
        divisor: float,
        scale: np.ndarray | None,
    ) -> Found:
        twin = self._twin
        twin.reset()
        twin.passes.repeated, twin.lost_final = live.passes.repeated, live.lost_final
        norms = {name: torch.zeros(1 + int(np.prod(shape))) for name, shape in shapes.items()}
        wrong = torch.zeros(len(_NAMES))
        unpack(sums["vectors"], [*twin.sums(False), *norms.values(), wrong])
        self.faults = {name for name, times in zip(_NAMES, wrong.tolist(), strict=True) if times}
        if matrices:
            slots = [self._slots(error) for error in _errors(twin)]
            unpack(sums["matrices"], [*twin.sums(True), *slots])
            for error, slot in zip(_errors(twin), slots, strict=True):
                error.copy_(slot.amax(0))
            rows = len(twin.sample.state)
            merged = together(sums["samples"], rows, self._elements)
            twin.sample.state, twin.sample.output, twin.sample.about = map(torch.from_numpy, merged)
        scale = None if scale is None else torch.tensor(float(scale))
        metrics, counts = twin.finish(matrices), twin.counts(matrices)
        for name in metrics:
            if name.endswith("_grad_rms") or name in EDGE_METRICS:
                metrics[name] = metrics[name] / (divisor if scale is None else divisor * scale)
            if name in EDGE_METRICS and not live.split:
                metrics[name] = metrics[name] / self.parallel.copies  # a sum over tokens, each seen so often
        found = {
            name: part[1:].reshape(shape)
            for (name, shape), part in zip(shapes.items(), norms.values(), strict=True)
            if part[0]
        }
        updated = {name: found.pop(name) for name in ("moved", "size") if name in found}
        metrics |= gradients.finished(found, scale, staged=self.staged) | ratio_of(updated)
        return metrics, counts, twin.sampled() if matrices else {}


def _present(sums: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """The sums there are, in the order of all that there may be, each after 1; zeros where there is none."""
    like = next(iter(sums.values()), torch.zeros(()))
    return [
        torch.cat([like.new_ones(1), sums[name].reshape(-1)])
        if name in sums
        else like.new_zeros(1 + int(np.prod(shape)))
        for name, shape in shapes.items()
    ]


def _errors(tally: Tally) -> list[Tensor]:
    return [] if tally.errors is None else tally.errors.tensors()
