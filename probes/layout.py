"""The layout of a run: which layer, read and source every row and column of a metric stands for.

Numbering (paper: a layer is one sublayer): layers 1..L; source 0 is the token embedding; read row l-1 belongs
to layer l, the last row is the final read. A triangle, of reads and sources or of states and outputs, is stored packed:
row by row, only the cells that exist.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from probes.vocabulary import MIXING, TRIANGLE

# What a stranger's run.json may say at most.
_MOST = 4096
_LONGEST = 300


@dataclass(frozen=True)
class Layer:
    """Layer `index` (from 1): its kind ("attention", "mlp"; "layer" where that is not known), transformer block (from 1) and module name."""

    index: int
    kind: str
    block: int
    name: str

    @property
    def label(self) -> str:
        kind = {"mlp": " (MLP)", "layer": ""}.get(self.kind, f" ({self.kind})")
        return f"layer {self.index}{kind}"


@dataclass(frozen=True)
class Read:
    """One row of the depth weights: `layer` reads `sources` sources; the final read has layer None."""

    label: str
    kind: str
    layer: int | None
    sources: int


@dataclass(frozen=True)
class Source:
    """One column of the depth weights: the layers first..last (0 is the embedding) whose outputs it sums."""

    label: str
    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Layers, reads (L+1) and sources of one model."""

    layers: list[Layer]
    reads: list[Read] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    experts: int = 0  # of the layer with most

    @classmethod
    def build(cls, layers: Sequence[Layer], depth_sources: Sequence[int] | None = None) -> "Layout":
        """Name reads and sources from the sources of each read ([L+1] counts; None: every earlier output)."""
        counts = list(depth_sources) if depth_sources is not None else list(range(1, len(layers) + 2))
        if len(counts) != len(layers) + 1:
            raise ValueError(f"{len(layers)} layers need {len(layers) + 1} reads, not {len(counts)}")
        reads = [
            Read(layer.label, layer.kind, layer.index, n)
            for layer, n in zip(layers, counts[:-1], strict=True)
        ]
        reads.append(Read("final read", "final", None, counts[-1]))
        return cls(list(layers), reads, _sources(layers, counts))

    @property
    def blocks(self) -> int:
        """Number of transformer blocks B."""
        return max((layer.block for layer in self.layers), default=0)

    @property
    def outputs(self) -> list[str]:
        """Labels of source 0..L, the rows of output metrics."""
        return ["embedding", *(layer.label for layer in self.layers)]

    @property
    def states(self) -> list[str]:
        """Labels of the states, the rows of hidden metrics: what each layer receives, and the final state."""
        return [*(f"into {layer.label}" for layer in self.layers), "final state"]

    def length(self, axis: str) -> int:
        """Number of entries along a vocabulary axis."""
        return {
            "state": len(self.layers) + 1,
            "output": len(self.layers) + 1,
            "layer": len(self.layers),
            "transformer block": self.blocks,
            "read": len(self.reads),
            "source": len(self.sources),
            "expert": self.experts,
        }[axis]

    def cells(self, axes: tuple[str, ...] = TRIANGLE) -> int:
        """Number of existing cells of a triangle."""
        count = len(self.layers) + 1
        return count * (count + 1) // 2 if axes == MIXING else sum(read.sources for read in self.reads)

    def triangle(self, axes: tuple[str, ...] = TRIANGLE) -> np.ndarray:
        """bool, in the lengths of `axes`: which source exists for which read, or which output for which state."""
        if axes == MIXING:
            return np.tri(len(self.layers) + 1, dtype=bool)
        counts = np.array([read.sources for read in self.reads])[:, None]
        return np.arange(len(self.sources))[None, :] < counts

    def pack(self, dense: np.ndarray, axes: tuple[str, ...] = TRIANGLE) -> np.ndarray:
        """[..., R, S] -> [..., cells]: the existing cells, row by row."""
        return dense[..., self.triangle(axes)]

    def unpack(self, packed: np.ndarray, axes: tuple[str, ...] = TRIANGLE) -> np.ndarray:
        """[..., cells] -> float32 [..., R, S], NaN where a cell does not exist."""
        triangle = self.triangle(axes)
        dense = np.full((*packed.shape[:-1], *triangle.shape), np.nan, np.float32)
        dense[..., triangle] = packed
        return dense

    def to_json(self) -> dict:
        data = asdict(self)
        return data if self.experts else {key: value for key, value in data.items() if key != "experts"}

    @classmethod
    def from_json(cls, data: dict) -> "Layout":
        layout = cls(
            [Layer(**row) for row in data["layers"]],
            [Read(**row) for row in data["reads"]],
            [Source(**row) for row in data["sources"]],
            data.get("experts", 0),
        )
        layout._check()
        return layout

    def _check(self) -> None:
        """ValueError where rows and columns do not fit together, or are more than any model has."""
        if max(len(self.layers), len(self.sources)) > _MOST:
            raise ValueError(f"more than {_MOST} layers or sources")
        if type(self.experts) is not int or not 0 <= self.experts <= _MOST:
            raise ValueError(f"{self.experts!r} is no number of experts")
        texts = [text for row in (*self.layers, *self.reads, *self.sources) for text in (row.label, row.kind)]
        texts += [layer.name for layer in self.layers]
        if not all(isinstance(text, str) and text.isprintable() and len(text) <= _LONGEST for text in texts):
            raise ValueError("names are texts on one line")
        if [layer.index for layer in self.layers] != list(range(1, len(self.layers) + 1)):
            raise ValueError("layers are counted from 1")
        ends = [n for source in self.sources for n in (source.first, source.last)]
        read = [each.layer for each in self.reads if each.layer is not None]
        if not all(type(n) is int and 0 <= n <= _MOST for n in (*ends, *read)):
            raise ValueError("a source or a read of no layer")
        if not all(type(layer.block) is int and 1 <= layer.block <= _MOST for layer in self.layers):
            raise ValueError("blocks are counted from 1")
        if not 1 <= len(self.reads) <= _MOST:
            raise ValueError(f"{len(self.reads)} reads")
        if not all(type(r.sources) is int and 1 <= r.sources <= len(self.sources) for r in self.reads):
            raise ValueError(f"a read of more than {len(self.sources)} sources or of none")


def difference(recorded: Layout, given: Layout) -> str:
    """What sets the layout of one model apart from another's, in a clause; empty where nothing does."""
    for what in ("layers", "reads", "sources"):
        theirs, ours = getattr(recorded, what), getattr(given, what)
        if len(theirs) != len(ours):
            return f"it was recorded with {len(theirs)} {what}, and this one has {len(ours)}"
    for theirs, ours in zip(recorded.layers, given.layers, strict=True):
        if _plain(theirs) != _plain(ours):
            return f"its {theirs.label} was {theirs.name}, and here {ours.label} is {ours.name}"
    for theirs, ours in zip(recorded.reads, given.reads, strict=True):
        if theirs != ours:
            return (
                f"its {theirs.label} had {theirs.sources} sources, and here {ours.label} has {ours.sources}"
            )
    if recorded.experts != given.experts:
        return f"its layers had up to {recorded.experts} experts, and here {given.experts}"
    return "" if recorded.sources == given.sources else "its depth blocks were others"


def _plain(layer: Layer) -> Layer:
    """A layer as it is called in a model that is not compiled."""
    return replace(layer, name=layer.name.replace("_orig_mod.", ""))


def _sources(layers: Sequence[Layer], counts: Sequence[int]) -> list[Source]:
    embedding = Source("embedding", "embedding", 0, 0)
    if counts[-1] == len(layers) + 1:
        return [embedding, *(Source(layer.label, layer.kind, layer.index, layer.index) for layer in layers)]
    # Block AttnRes: a column appears with the first read that sees the first output of a new depth block, so
    # the read of layer l that first counts n+1 sources says that depth block n begins with layer l-1.
    firsts, most = [], 1
    for position, count in enumerate(counts):
        if count > most:
            firsts.append(position)
            most = count
    lasts = [first - 1 for first in firsts[1:]] + [len(layers)]
    spans = zip(firsts, lasts, strict=True)
    return [
        embedding,
        *(
            Source(
                f"depth block {n} (layers {a}–{b})" if b > a else f"depth block {n} (layer {a})",
                "depth block",
                a,
                b,
            )
            for n, (a, b) in enumerate(spans, 1)
        ),
    ]
