"""Before a conversion: does the model's stream really add up its layers' outputs?

One more forward pass in training mode carries the sources as a converted model would, but every read is their plain
sum. Where the model is PreNorm, each of these states is the one that the model has by itself.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from attnres.carrying import attach, depth_outputs
from attnres.plans import plans_of
from attnres.trying import run_watched
from attnres.watching import ConversionError, WatchedBlock

INSIDE = (
    "{} where a depth block ends inside a transformer block, and only there: something is done to an output after its last "
    "module, such as dropout by a function, or a module adds the state itself. Take a layers_per_block that is a multiple of "
    "{}, with which each transformer block adds up by itself, or set such a dropout to 0."
)


class SummedDepth:
    """Sources that every read simply adds up (Eq. 1), in a pass without gradients."""

    records = False

    def __init__(self, states: list[Tensor], sources: tuple = ()):
        self.states, self.sources = states, sources

    def commit(self, sources: Sequence[Tensor], written: int) -> "SummedDepth":
        return SummedDepth(self.states, (*self.sources, *sources))

    def read(self, row: int, running: Sequence[Tensor]) -> Tensor:
        self.states.append(torch.stack([*self.sources, *running]).sum(0))
        return self.states[-1]


def verify(
    model: nn.Module, args: tuple, kwargs: dict, blocks: list[WatchedBlock], layers_per_block: int
) -> None:
    """ConversionError, naming the first layer whose state differs by more than 1e-3, where sources do not add up."""
    try:
        _verify(model, args, kwargs, blocks, layers_per_block)
    except ConversionError as error:
        if all(plan.slots == 1 for plan in plans_of(blocks, layers_per_block)):
            raise
        counts = [len(block.layers) for block in blocks]
        try:
            # In one depth block of all layers every transformer block adds up by itself.
            _verify(model, args, kwargs, blocks, sum(counts))
        except ConversionError:
            raise error from None
        whole = counts[0] if len({*counts}) == 1 else sum(counts)
        raise ConversionError(INSIDE.format(str(error).partition(":")[0], whole)) from error


def _verify(
    model: nn.Module, args: tuple, kwargs: dict, blocks: list[WatchedBlock], layers_per_block: int
) -> None:
    summed: list[Tensor] = []
    names = [layer.name for block in blocks for layer in block.layers]
    handles = attach(model, blocks, layers_per_block, depth_outputs(len(names)), partial(SummedDepth, summed))
    failure = None
    try:
        run_watched(model, args, kwargs, handles)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        failure = error
    states = [layer.state for block in blocks for layer in block.layers] + [blocks[-1].output]
    for name, state, sum_ in zip([*names, "the final state"], states, summed, strict=False):
        _check_state(name, state, sum_)
    if failure is not None:
        name = names[min(max(len(summed) - 1, 0), len(names) - 1)]
        raise ConversionError(
            f"The sources cannot be carried through {name}: {type(failure).__name__}: {failure}"
        ) from failure


def _check_state(name: str, state: Tensor, summed: Tensor) -> None:
    # bfloat16 itself is off by up to 2**-8 at every sum.
    tolerance = max(1e-3, 4 * torch.finfo(state.dtype).eps)
    difference = (
        ((summed - state).norm() / state.norm()).item() if summed.shape == state.shape else float("nan")
    )
    if not difference <= tolerance:
        raise ConversionError(
            f"{name} does not receive the embedding plus the sum of the outputs before it: it differs by "
            f"{difference:.1e} (relative). Something else changes the stream there, such as a norm, a scale of the "
            "state or a second path; only a PreNorm stream can be converted."
        )
