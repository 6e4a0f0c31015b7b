"""The stages of a pipeline as one model: its layers in order, and the sums of one stage in the places of the whole.

What crosses from one stage to the next is a state, the one that the next stage's first layer receives: that stage tells of
it. What a later stage is given is no embedding, though it stands where one does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from probes.experts import Experts
from probes.layout import Layer
from probes.manifest import RunError
from probes.packing import packed, unpack
from probes.pipeline import Stage, reads_in
from probes.sites import LayerSite, Sites
from probes.tally import Tally


def told_of(sites: Sites, stage: Stage) -> dict:
    """One stage in JSON, for the other processes. Raises RunError for one whose stream is no plain sum of outputs."""
    if sites.has_reads or sites.is_marked:
        raise reads_in(sites.root)
    layers = [asdict(site.layer) | {"given": site.given} for site in sites.layers]
    experts = [None if each is None else [each.count, each.stacked] for each in sites.experts]
    return {
        "index": stage.index,
        "count": stage.count,
        "layers": layers,
        "experts": experts,
        "change": sites.change,
    }


def judge(told: Sequence[list[dict]]) -> list[dict]:
    """What the processes told, each of its stages, as all stages in order; none where there are none. Raises RunError where they
    make no pipeline."""
    if not any(told):
        return []
    if not all(told):
        raise RunError(
            f"Rank {list(map(bool, told)).index(False)} records no stage of a pipeline, and others do: give every process its "
            "schedule."
        )
    count = told[0][0]["count"]
    stages = {each["index"]: each for held in told for each in held}
    missing = set(range(count)) - set(stages)
    if missing:
        raise RunError(
            f"No process records stage {min(missing)} of {count}: call probes.record on every process."
        )
    teams = len({tuple(each["index"] for each in held) for held in told})
    for index in range(count):
        holders = [held for held in told if any(each["index"] == index for each in held)]
        alike = all(each == stages[index] for held in holders for each in held if each["index"] == index)
        if len(holders) * teams != len(told) or not alike:
            raise RunError(f"Stage {index} of {count} is not held alike by as many processes as the others.")
    return [stages[index] for index in range(count)]


def whole(stages: Sequence[dict], sites: Sites) -> Sites:
    """The sites of the whole model, where nothing can be hooked; `sites` are those of one stage."""
    names = [layer["name"] for stage in stages for layer in stage["layers"]]
    alike = len(set(names)) < len(names)
    found: list[LayerSite] = []
    experts: list[Experts | None] = []
    blocks = 0
    for stage in stages:
        before = len(found)
        for layer in stage["layers"]:
            given = layer["given"] + before
            name = f"stage {stage['index']}: {layer['name']}" if alike else layer["name"]
            moved = Layer(layer["index"] + before, layer["kind"], layer["block"] + blocks, name)
            found.append(LayerSite(moved, None, None, None, given, ()))
        blocks = found[-1].layer.block
        for each in stage["experts"]:
            # Only how many there are is known of those elsewhere.
            experts.append(None if each is None else Experts(each[0], None, (None,) * (1 if each[1] else 2)))
    change = next((stage["change"] for stage in stages if stage["change"]), "")
    sites = replace(sites, layers=found, change=change, outputs=(), entry=None, norm=None, staged=True)
    vars(sites)["experts"] = experts
    return sites


@dataclass(frozen=True)
class Span:
    """Which layers of the whole one stage has: those after the first `before`, `layers` of `every`."""

    before: int
    layers: int
    every: int

    @classmethod
    def of(cls, stages: Sequence[dict], index: int) -> "Span":
        counts = [len(stage["layers"]) for stage in stages]
        return cls(sum(counts[:index]), counts[index], sum(counts))

    @property
    def first(self) -> bool:
        return self.before == 0

    @property
    def last(self) -> bool:
        return self.before + self.layers == self.every

    def rows(self, place: str) -> tuple[slice, slice]:
        """Of the rows of a "state" or an "output" those that this stage tells of: its own, and where they belong."""
        start = 1 if place == "output" and not self.first else 0
        stop = self.layers + (1 if place == "output" or self.last else 0)
        return slice(start, stop), slice(self.before + start, self.before + stop)


class Whole:
    """In place of a `Spread` where a process has all stages, or there are none: everything is in its place."""

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes

    def vectors(self, flat: np.ndarray, shapes: dict[str, tuple[int, ...]], more: int) -> np.ndarray:
        return flat

    def matrices(self, flat: np.ndarray) -> np.ndarray:
        return flat

    def sample(self, flat: np.ndarray) -> np.ndarray:
        return flat


class Spread:
    """Puts what `Together` has packed of one stage into the places of the whole model, on the host."""

    def __init__(self, sites: Sites, everything: Sites, span: Span, share: int):
        cpu = torch.device("cpu")
        self._span = span
        self._mine, self._all = Tally(sites, cpu, share), Tally(everything, cpu, share)

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Those of the whole, for the sums of a stage's parameters."""
        span = self._span
        if shapes["parts"] != (0,):
            raise RunError(
                "Sequence parallelism in the stages of a pipeline is recorded with fully_shard beside it."
            )
        more = {span.layers: span.every, span.layers + 1: span.every + 1}
        return {
            name: shape if name in ("parts", "queries") else tuple(more[n] for n in shape)
            for name, shape in shapes.items()
        }

    def vectors(self, flat: np.ndarray, shapes: dict[str, tuple[int, ...]], more: int) -> np.ndarray:
        """The sums of vectors, those of parameters (in `shapes`, each after 1 where it is there), and `more` numbers."""
        mine, every, span = self._mine, self._all, self._span
        norms = {
            name: torch.zeros(1 + int(np.prod(shape)), dtype=torch.float64) for name, shape in shapes.items()
        }
        rest = torch.zeros(more, dtype=torch.float64)
        unpack(flat, [*mine.sums(False), *norms.values(), rest])
        every.reset()
        for place, rows in mine.counted.forward.items():
            own, there = span.rows(place)
            for part, into in zip(rows.tensors(), every.counted.forward[place].tensors(), strict=True):
                into[there] = part[own]
            backward = zip(
                every.counted.backward[place].rows[there], mine.counted.backward[place].rows[own], strict=True
            )
            for into, part in backward:
                into.copy_(part)
        seen = torch.tensor([span.first, span.last])  # the embedding and the final norm, each by one stage
        every.calls.copy_(mine.calls * seen)
        moved = [self._moved(part, shapes[name]) for name, part in norms.items()]
        return packed([*every.sums(False), *moved, rest]).numpy()

    def matrices(self, flat: np.ndarray) -> np.ndarray:
        """Counts of non-finite values and of the tokens of experts."""
        span, whole = self._span, self._all.counted
        nonfinite = np.zeros(span.every + 1)
        own, there = span.rows("state")
        nonfinite[there] = flat[: span.layers + 1][own]
        if whole.experts is None:
            return nonfinite
        experts = np.zeros(whole.experts.shape)
        if self._mine.counted.experts is not None:
            mine = flat[span.layers + 1 :].reshape(span.layers, -1)
            rows = slice(span.before, span.before + span.layers)
            # To each expert, however many other layers have; then to none of them, and all that came.
            experts[rows, : mine.shape[1] - 2], experts[rows, -2:] = mine[:, :-2], mine[:, -2:]
        return np.concatenate([nonfinite, experts.ravel()])

    def sample(self, flat: np.ndarray) -> np.ndarray:
        """The sample, NaN in the rows of other stages."""
        few, many = self._span.layers + 1, self._span.every + 1
        elements = self._mine.sample.elements
        cut = np.split(flat, [few * elements, 2 * few * elements])
        about = np.zeros((2, many, 3), np.float32)
        found = []
        for kind, place in enumerate(("state", "output")):
            own, there = self._span.rows(place)
            rows = np.full((many, elements), np.nan, np.float32)
            rows[there] = cut[kind].reshape(few, elements)[own]
            about[kind, there] = cut[2].reshape(2, few, 3)[kind, own]
            found.append(rows.ravel())
        return np.concatenate([*found, about.ravel()])

    def _moved(self, part: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The sums of one kind by layer, with those of no layer at the end where there are such; after a number."""
        span = self._span
        if shape not in ((span.layers,), (span.layers + 1,)):
            return part
        there, rows = part[:1], part[1:]
        before = rows.new_zeros(span.before)
        after = rows.new_zeros(span.every - span.before - span.layers)
        return torch.cat([there, before, rows[: span.layers], after, rows[span.layers :]])
