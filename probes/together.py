"""One recorded step of a model that several processes train: what adds up is summed over them, and rank 0 makes the metrics.

A step's sums are made of counts and of sums of squares, so those of all processes are those of the whole batch.
"""

import contextlib
import functools
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from probes.edges import EDGE_METRICS
from probes.flush import start_copy
from probes.merging import Merging, Step, Sums
from probes.packing import packed, together, unpack
from probes.processes import Agreed
from probes.stages import Span, Spread, Whole, whole
from probes.tally import Tally
from probes.updates import ratio_of
from probes.vocabulary import METRICS
from probes.watched import Part, Watch

_NAMES = tuple(METRICS)
_PATIENCE, _HASTE = 60.0, 5.0  # seconds to wait for other processes at the end
Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
Said = list[tuple[str, int, float]]  # scalars that another process has logged, with their steps
Done = Callable[[Found | None, Mapping[str, np.ndarray], str, Said], None]


@dataclass(frozen=True)
class Handed:
    """Step `number` of this process, with `matrices` or without: what was watched in it, without the metrics that are `wrong`;
    its `own` values; and the scalars it has `said`, with their steps.

    `done(found, own, why, said)` is called, in a thread, when those of all are known: on rank 0 `found` are metrics, counts and
    sample, as `Tally.finish`, `.counts` and `.sampled` give them, elsewhere and where they cannot be known None; `why` then says
    the reason. `own` comes back as it was given. On rank 0 `said` is what another process has."""

    number: int
    matrices: bool
    watch: Watch
    done: Done
    wrong: frozenset[str] = frozenset()
    own: Mapping[str, Tensor] = field(default_factory=dict)
    said: Sequence[tuple[str, int, float | Tensor]] = ()


class Together:
    """`hand` over a step on every process. `sites` are those of all layers, also where this process has but stages of them. The
    process that `speaks` knows the loss, and is not rank 0."""

    def __init__(self, agreed: Agreed, parts: Sequence[Part]):
        self.parallel = parts[0].parallel
        self.sites = whole(agreed.stages, parts[0].sites) if agreed.stages else parts[0].sites
        self._rank, self._world = agreed.rank, agreed.world
        self.staged = bool(agreed.stages)
        self.speaks = self._rank == agreed.speaker > 0
        self.merging = Merging(agreed)
        share = self.merging.senders
        self._spreads: list[Spread | Whole] = [Whole()]
        if self.staged:
            spans = [Span.of(agreed.stages, part.stage.index) for part in parts]
            self._spreads = [
                Spread(part.sites, self.sites, span, share) for part, span in zip(parts, spans, strict=True)
            ]
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

    def hand(self, step: Handed) -> None:
        watched = list(step.watch)
        wrong = torch.tensor([float(name in step.wrong) for name in _NAMES])
        shapes = [each.gradients.shapes() | each.updates.shapes() for each in watched]
        everything = self._spreads[0].shapes(shapes[0])
        parts = {}
        for i, each in enumerate(watched):
            tally = each.taps.tally
            tally.settle()
            sums = each.gradients.sums() | each.updates.sums(step.number)
            vectors = [*tally.sums(False), *_present(sums, shapes[i]), wrong.to(tally.device)]
            parts["vectors", i] = packed(vectors)
            if step.matrices:
                parts["matrices", i] = packed(self._matrices(tally))
                if self.merging.sends:
                    parts["sample", i] = packed(tally.sample.tensors())
        divisor = self.parallel.divisor
        logged = {("said", i): x for i, (_, _, x) in enumerate(step.said) if isinstance(x, Tensor)}
        known = {("own", name): value for name, value in step.own.items()} | logged
        fetch = start_copy(parts | known, torch.float64)
        own: dict = {}

        def fetched() -> Sums:
            values = fetch()
            own.update({name: values["own", name] for name in step.own})
            sums = self._in_place(values, shapes)
            if self.speaks:
                rows = [
                    (name, number, float(values.get(("said", i), x)))
                    for i, (name, number, x) in enumerate(step.said)
                ]
                sums["said"] = np.frombuffer(json.dumps(rows).encode(), np.uint8).copy()
            return sums

        def then(sums: Sums | None, why: str) -> None:
            try:
                if self._rank or sums is None:
                    step.done(None, own, why, [])
                else:
                    found = self._made(sums, step, everything, divisor, own.get("scale"))
                    step.done(found, own, "", json.loads(bytes(sums.get("said", b"")) or b"[]"))
            finally:
                self._done = self._waiting.popleft()

        nbytes = sum(8 * part.numel() for part in parts.values())
        self._waiting.append(step.number)
        self.merging.hand(Step(step.number, step.matrices, fetched, then, nbytes))

    def close(self, status: str) -> bool:
        """Whether all that was handed over has been summed."""
        return self.merging.close(_PATIENCE if status == "finished" else _HASTE)

    def _matrices(self, tally: Tally) -> list[Tensor]:
        nonfinite, *depth = tally.sums(True)
        # Of a state that several processes hold, each tells a share.
        shares = [1.0 if row in tally.split else 1 / self.parallel.copies for row in range(len(nonfinite))]
        told = nonfinite.double() * torch.tensor(shares, dtype=torch.float64).to(nonfinite.device)
        return [told, *depth, *(self._slots(error) for error in _errors(tally))]

    def _in_place(self, values: Mapping, shapes: Sequence[dict[str, tuple[int, ...]]]) -> Sums:
        """What was packed of each part, on the host, together in the places of the whole model."""
        each = list(enumerate(self._spreads))
        sums = {
            "vectors": sum(spread.vectors(values["vectors", i], shapes[i], len(_NAMES)) for i, spread in each)
        }
        if ("matrices", 0) in values:
            sums["matrices"] = sum(spread.matrices(values["matrices", i]) for i, spread in each)
        if ("sample", 0) in values:
            # NaN where a part has no rows.
            sums["sample"] = functools.reduce(
                np.fmax, [spread.sample(values["sample", i]) for i, spread in each]
            )
        return sums

    def _slots(self, mine: Tensor) -> Tensor:
        """A place for each process's own, for what does not add up."""
        slots = mine.new_zeros(self._world, *mine.shape)
        slots[self._rank] = mine
        return slots

    # On rank 0, when the sums of all have come

    def _made(
        self,
        sums: Sums,
        step: Handed,
        shapes: dict[str, tuple[int, ...]],
        divisor: float,
        scale: np.ndarray | None,
    ) -> Found:
        twin, live = self._twin, [each.taps.tally for each in step.watch]
        twin.reset()
        twin.passes.repeated = set().union(*(each.passes.repeated for each in live))
        twin.lost_final = any(each.lost_final for each in live)
        norms = {name: torch.zeros(1 + int(np.prod(shape))) for name, shape in shapes.items()}
        wrong = torch.zeros(len(_NAMES))
        unpack(sums["vectors"], [*twin.sums(False), *norms.values(), wrong])
        self.faults = {name for name, times in zip(_NAMES, wrong.tolist(), strict=True) if times}
        if step.matrices:
            slots = [self._slots(error) for error in _errors(twin)]
            unpack(sums["matrices"], [*twin.sums(True), *slots])
            for error, slot in zip(_errors(twin), slots, strict=True):
                error.copy_(slot.amax(0))
            rows = len(twin.sample.state)
            merged = together(sums["samples"], rows, self._elements)
            twin.sample.state, twin.sample.output, twin.sample.about = map(torch.from_numpy, merged)
        scale = None if scale is None else torch.tensor(float(scale))
        metrics, counts = twin.finish(step.matrices), twin.counts(step.matrices)
        for name in metrics:
            if name.endswith("_grad_rms") or name in EDGE_METRICS:
                metrics[name] = metrics[name] / (divisor if scale is None else divisor * scale)
            if name in EDGE_METRICS and not any(each.split for each in live):
                metrics[name] = metrics[name] / self.parallel.copies  # a sum over tokens, each seen so often
        found = {
            name: part[1:].reshape(shape)
            for (name, shape), part in zip(shapes.items(), norms.values(), strict=True)
            if part[0]
        }
        updated = {name: found.pop(name) for name in ("moved", "size") if name in found}
        metrics |= step.watch.first.gradients.finished(found, scale, staged=self.staged) | ratio_of(updated)
        return metrics, counts, twin.sampled() if step.matrices else {}


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
