"""Where the layers of each transformer block of a converted model stand among the depth blocks, and how far a pass is."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnres.depth import Depth
from attnres.watching import ConversionError, WatchedBlock

SKIPPED = (
    "{} did not run in its place in this forward pass, and an AttnRes model needs every layer that was converted, once "
    "and in order, in every pass: switch off what leaves layers out."
)


@torch.compiler.assume_constant_result
def this_thread() -> int:
    """Passes of several threads go through one model side by side; compiled code keeps the thread that traced it."""
    return threading.get_ident()


@dataclass
class Progress:
    """How far one call of a transformer block has come."""

    depth: list[Depth] = field(default_factory=list)
    """The sources, from its entry to its last norm; while compiling, to its exit."""
    read: list[int] = field(default_factory=list)
    """The layers that have read, from 0; not while compiling."""
    calls: list = field(default_factory=list)
    """Where it counts: the layer that runs, and the modules called since its norm that may end it."""

    def begin(self, depth: Depth) -> None:
        self.depth[:] = [depth]
        self.read.clear()


class Plan:
    """Where the layers of one transformer block stand among the depth blocks, and how its code is given the state."""

    def __init__(self, block: WatchedBlock, first: int, layers_per_block: int):
        self.name, self.keyword = block.name, block.keyword
        self.first = first
        """How many layers come before."""
        self.layers = len(block.layers)
        self.begins = first % layers_per_block == 0
        """Whether its first layer begins a depth block."""
        boundaries = [(first + index) % layers_per_block == 0 for index in range(1, self.layers)]
        self.slot = [sum(boundaries[:index]) for index in range(self.layers)]
        """The slot that each layer writes to."""
        self.slots = self.slot[-1] + 1
        self.layer_names = [layer.name for layer in block.layers]
        self.threads: dict[int, Progress] = {}
        self.was_compiled = False
        """Whether a layer's read was ever traced: compiled code does not count, so nothing is known of what was left out."""
        self.counts = self.slots > 1 and any(layer.tail_calls > 1 for layer in block.layers)
        """Whether a module that ends a layer is called more than once, so that calls have to be told apart."""
        self.parts = {layer.norm_name: layer.norm for layer in block.layers}
        """The block's children that have hooks of ours, by their names."""
        if self.slots > 1:
            self.parts |= {layer.tail_name: layer.tail for layer in block.layers}

    def progress(self) -> Progress:
        """That of the call in this thread."""
        thread = this_thread()
        if thread not in self.threads:
            self.threads[thread] = Progress()
        return self.threads[thread]

    @torch.compiler.assume_constant_result
    def note_compiled(self) -> bool:
        """Done while the compiler traces, not by the code that it makes."""
        self.was_compiled = True
        return True

    def check_read(self, read: list[int], count: int) -> None:
        """RuntimeError where the layers that have read are not the first `count`."""
        if read != [*range(count)] and not self.was_compiled:
            missing = [index for index in range(count) if index not in read]
            raise RuntimeError(SKIPPED.format(self.layer_names[(missing or read)[0]]))

    def state(self, args: tuple, kwargs: dict) -> Tensor:
        return args[0] if self.keyword is None else kwargs[self.keyword]

    def replaced(self, args: tuple, kwargs: dict, state: Tensor) -> tuple[tuple, dict]:
        if self.keyword is None:
            return (state, *args[1:]), kwargs
        return args, kwargs | {self.keyword: state}

    def widened(self, x: Tensor, slot: int) -> Tensor:
        """x in its slot and zeros in the others, [slots, B, T, D]; x itself where there is one slot only."""
        if self.slots == 1:
            return x
        return torch.stack([x if index == slot else torch.zeros_like(x) for index in range(self.slots)])


def plans_of(blocks: Sequence[WatchedBlock], layers_per_block: int) -> list[Plan]:
    """One for each block; ConversionError where one of them cannot know by which block a module is called."""
    plans, first = [], 0
    for block in blocks:
        plans.append(Plan(block, first, layers_per_block))
        first += len(block.layers)
    owners: dict[nn.Module, list[str]] = {}
    for block in blocks:
        for module in block.module.modules():
            owners.setdefault(module, []).append(block.name)
    for block, plan in zip(blocks, plans, strict=True):
        for layer in block.layers if plan.slots > 1 else ():
            if len(owners[layer.tail]) > 1:
                raise ConversionError(
                    f"{layer.name} ends in {block.name}.{layer.tail_name}, which is part of {' and '.join(owners[layer.tail])}, "
                    "and where a depth block ends inside a transformer block each needs its own: copy it for each, or take a "
                    f"layers_per_block that is a multiple of {plan.layers}."
                )
    return plans
