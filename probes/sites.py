"""The sites of one model: where each layer's state and output can be seen, and what belongs to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from probes.experts import Experts, experts_in
from probes.found import FoundReads, Spot
from probes.layout import Layer, Layout
from probes.manifest import RunError


@dataclass(frozen=True)
class Place:
    """A tensor at a module's boundary: one of its inputs (`key` is the argument's position, `keyword` its name) or its
    output (`key` is the element, where it has several)."""

    name: str
    module: nn.Module
    is_input: bool
    key: int = 0
    keyword: str | None = None
    within: tuple = ()  # where it is in that argument or element, if that holds several
    turn: int | None = None  # at which call of the module in a forward; None: it has but one

    def given(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The tensor, from the arguments of a call."""
        return reached(self._given(args, kwargs), self.within)

    def _given(self, args: tuple, kwargs: dict) -> object:
        if self.keyword in kwargs:
            return kwargs[self.keyword]
        if args or self.keyword is not None:
            return args[self.key] if self.key < len(args) else None
        return next(iter(kwargs.values()), None)

    def made(self, output: object) -> Tensor | None:
        """The tensor, from what a call returned."""
        return reached(self._made(output), self.within)

    def _made(self, output: object) -> object:
        if isinstance(output, dict):
            return next(iter(output.values()), None)
        if isinstance(output, tuple | list):
            return output[self.key] if self.key < len(output) else None
        return output

    def __str__(self) -> str:
        return f"{'input' if self.is_input else 'output'} of {self.name}"


def place_of(spot: Spot, runs: int = 1) -> Place:
    """A spot as a place; its module `runs` so many times in a forward."""
    turn = spot.turn if runs > 1 else None
    if not spot.before:
        return Place(
            spot.name, spot.module, False, key=(spot.path or (0,))[0], within=spot.path[1:], turn=turn
        )
    (kind, key), within = spot.path[:2], spot.path[2:]
    if kind == 0:
        return Place(spot.name, spot.module, True, key=key, within=within, turn=turn)
    return Place(spot.name, spot.module, True, keyword=key, within=within, turn=turn)


def reached(tree: object, path: tuple) -> object:
    """What `path` leads to through lists, tuples and dicts; None where nothing is there."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def put(tree: object, path: tuple, x: Tensor) -> object:
    """The tree of tuples, lists and dicts with `x` where `path` leads; made anew, but for the output objects of a
    library, which are made for one call."""
    if not path:
        return x
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        changed = put(tree[key], rest, x)
        if type(tree) is dict:
            return {**tree, key: changed}
        tree[key] = changed
        return tree
    parts = [put(part, rest, x) if place == key else part for place, part in enumerate(tree)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


@dataclass(frozen=True)
class Made:
    """A tensor computed from others: `run` is given those at `leaves`, the last of which is the last to be seen, then
    the parameters and buffers that `held` names by module and attribute, or the parts of them that have the given (size,
    stride, offset). It has no gradient that a hook could see."""

    run: Callable[..., Tensor]
    leaves: tuple[Place, ...]
    held: tuple[tuple[nn.Module, str, tuple | None], ...]

    def value(self, seen: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            held = [
                getattr(module, name) if part is None else getattr(module, name).as_strided(*part)
                for module, name, part in self.held
            ]
            return self.run(*seen, *held)

    def __str__(self) -> str:
        return f"made of {', '.join(map(str, self.leaves))}"


@dataclass(frozen=True)
class LayerSite:
    """One layer. Its state is seen at `state`, or computed as `state_made` says, or is the state before plus the output
    before (where it `sums`). Its output is seen at `output`, or is what the stream holds more at `after` than at
    `state`, or computed as `output_made` says; otherwise it is not seen. `given` is the number of sources that its state
    sums: all before it, but for layers side by side."""

    layer: Layer
    state: Place | None
    output: Place | None
    after: Place | None
    given: int
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...] = ()
    sums: bool = True
    state_made: Made | None = None
    output_made: Made | None = None

    @property
    def route(self) -> str:
        """How the output is seen, in words."""
        if self.output is not None:
            return str(self.output)
        if self.after is not None:
            return f"{self.after} − state"
        return str(self.output_made or "not seen")


@dataclass(frozen=True)
class Sites:
    """Every place of one model that is tapped. `final` is where the final state is seen, None where it is only marked
    (marks.py). `reads` is empty for a model without depth reads, else L+1 modules. `change` says what else happens to
    the stream than layers adding to it."""

    root: nn.Module
    layers: list[LayerSite]
    final: Place | None
    reads: list[nn.Module]
    change: str = ""
    holders: tuple[nn.Module, ...] = ()  # modules between the root and the stack, outermost first
    outputs: tuple[nn.Module, ...] = ()  # modules called with the plain output of layer `depth_output`
    entry: Place | None = (
        None  # where the embedding is seen in blocks that mix streams; elsewhere it is the first state
    )
    norm: nn.Module | None = None  # the norm after the stack, where one was found: it runs once in a forward
    found: FoundReads | None = None  # depth reads of a model that does not say where they are
    inner: nn.Module | None = None  # the child that a training step calls instead of the root
    staged: bool = False  # whether they are those of one stage of a pipeline, or of all its stages as one
    named: bool = False  # the user said which modules the layers are
    # The norm beside the stack, where `final` is what the last block returns: what it is given after that is the final
    # state, if it has the stream's shape.
    receiver: Place | None = None

    @property
    def called(self) -> nn.Module:
        """The module whose forward is a forward of the model."""
        return self.root if self.inner is None else self.inner

    @property
    def is_plain(self) -> bool:
        """Whether every state should be the plain sum of the sources before it."""
        return not self.has_reads and not self.change

    @property
    def is_marked(self) -> bool:
        """Whether nothing but the author's marks shows the layers."""
        return self.final is None and not any(site.state or site.output or site.after for site in self.layers)

    @property
    def has_reads(self) -> bool:
        return bool(self.reads) or self.found is not None

    @property
    def depth_sources(self) -> list[int]:
        """Number of sources of each read."""
        if self.found is not None:
            return [read.sources for read in self.found.rows]
        if self.is_marked:
            return list(range(1, len(self.layers) + 2))
        return [read.depth_sources for read in self.reads]

    @property
    def states_of_reads(self) -> dict[int, int]:
        """Rows of states that no module is given but a found read makes, by row of the read. They are seen where reads
        are, with the matrices."""
        if self.found is None:
            return {}
        last = len(self.layers)
        row_of = [last if read.layer is None else read.layer - 1 for read in self.found.rows]
        unseen = {row for row, site in enumerate(self.layers) if site.state is None}
        unseen |= {last} if self.final is None else set()
        return {read: row for read, row in enumerate(row_of) if row in unseen and row_of.count(row) == 1}

    @property
    def computed_states(self) -> set[int]:
        """Rows of states that have values and no gradient, for no tensor of the model shows them."""
        made = {row for row, site in enumerate(self.layers) if site.state_made is not None}
        return made | set(self.states_of_reads.values())

    @property
    def computed_outputs(self) -> set[int]:
        """The same of outputs."""
        return {row for row, site in enumerate(self.layers, 1) if site.output_made is not None}

    @property
    def layout(self) -> Layout:
        if self.found is not None:
            layout = Layout(
                [site.layer for site in self.layers], list(self.found.rows), list(self.found.columns)
            )
        else:
            layout = Layout.build([site.layer for site in self.layers], self.depth_sources or None)
        return replace(layout, experts=max((each.count for each in self.experts if each), default=0))

    @cached_property
    def experts(self) -> list[Experts | None]:
        """The experts of each layer, None for one without."""
        return [experts_in(site.modules or self._named(site.layer.name)) for site in self.layers]

    def _named(self, name: str) -> list[nn.Module]:
        try:
            return [self.root.get_submodule(name)]
        except AttributeError:
            return []

    def layer_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each layer: sublayer, norms, gate and depth query; shared ones count once, first."""
        reads = self.reads[:-1] or [None] * len(self.layers)
        seen: set[nn.Parameter] = set()
        grouped = []
        for site, read in zip(self.layers, reads, strict=True):
            modules = [*site.modules, *([read] if read is not None else [])]
            every = [*(p for module in modules for p in module.parameters()), *site.parameters]
            own = [p for p in dict.fromkeys(every) if p not in seen]
            seen.update(own)
            grouped.append(own)
        return grouped


def unwrap(model: nn.Module) -> nn.Module:
    """The module the user wrote, from under torch.compile and data parallelism."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            if len(getattr(model, "device_ids", None) or []) > 1:
                raise RunError(
                    "DataParallel over several devices cannot be recorded: use DistributedDataParallel."
                )
            model = model.module
        else:
            return model
