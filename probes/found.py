"""Depth reads of a model that does not say where they are: their rows and columns, and how each is seen."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from probes.layout import Read, Source


@dataclass(frozen=True)
class Spot:
    """Where a hook meets a tensor: among the arguments (`before`) or in the result of the `turn`-th call of a module in
    one forward. `path` leads there through lists, tuples and dicts; `moment` orders all spots of the forward."""

    name: str
    module: nn.Module
    turn: int
    before: bool
    path: tuple
    moment: int


@dataclass(frozen=True)
class Moment:
    """A module is about to be called for the `turn`-th time, or has been; there were `nodes` nodes by then, and `place`
    moments."""

    name: str
    module: nn.Module
    turn: int
    before: bool
    nodes: int
    place: int


@dataclass(frozen=True)
class Replay:
    """`run(*values)` gives (weights [S, B, T], sources S times [B, T, D], the mix [B, T, D], what is made of it where
    that alone is seen). The values are those of `spots`, then the tensors that `held` names by module and attribute (or
    are themselves). `normalised`: the weights are those of the normalised sources, or the mix comes out normalised."""

    run: Callable
    spots: tuple[Spot, ...]
    held: tuple[tuple[nn.Module, str] | Tensor, ...]
    normalised: bool

    def weights(self, seen: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        held = [each if isinstance(each, Tensor) else getattr(*each) for each in self.held]
        return self.run(*seen, *held)


@dataclass(frozen=True)
class FoundRead:
    """One read: `route` says in words how it is seen, `when` it can be computed, `state` where the mix itself is seen
    (None: nowhere), `witness` where instead something made of it is seen, as by a norm that is no module. Where both are
    None it cannot be checked against the model. `query` names parameters, by module and attribute, whose product is the
    query; empty where that is not known. `is_source`: the state is a source itself, which later reads take too."""

    route: str
    replay: Replay
    when: Moment
    state: Spot | None
    query: tuple[tuple[nn.Module, str], ...]
    witness: Spot | None = None
    is_source: bool = False


@dataclass(frozen=True)
class FoundReads:
    """All reads of a model, as rows and columns of its layout; `embedding` are places (sites.py): where source 0 is seen, or the parts that it
    sums, `notes` name what is odd about the model, and `tokens_first` says that its streams are [T, B, D],
    `turned` that the embedding alone is seen as [B, T, D]."""

    reads: tuple[FoundRead, ...]
    rows: tuple[Read, ...]
    columns: tuple[Source, ...]
    embedding: tuple
    notes: tuple[str, ...] = ()
    tokens_first: bool = False
    turned: bool = False
