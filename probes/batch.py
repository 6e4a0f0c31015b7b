"""A batch: the arguments of a forward, of which some of the sequences can be taken."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from probes.effects import Effects, first_of, sequences_of
from probes.gates import Gates
from probes.objective import Objective

_TRIED = 4  # tensors of which it may be tried whether they go by sequence


@dataclass(frozen=True)
class Batch:
    """B sequences for the model `root`; `mask_of` finds the mask in the arguments."""

    root: nn.Module
    args: tuple
    kwargs: Mapping
    objective: Objective
    gates: Gates
    mask_of: Callable[[tuple, dict], Tensor | None]

    @property
    def sequences(self) -> int:
        return sequences_of(self.args, self.kwargs)

    @property
    def tokens(self) -> int:
        """T, of the first tensor that has it."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        return next((x.shape[1] for x in tensors if x.ndim > 1), 1)

    def part(self, first: int, last: int) -> Effects:
        args, kwargs = taken(self.args, self.kwargs, first, last, self._of_all)
        return Effects(self.root, args, kwargs, self.objective, self.gates, self.mask_of(args, kwargs))

    @cached_property
    def _of_all(self) -> frozenset:
        return of_all(self.root, self.args, self.kwargs)


def taken(args: tuple, kwargs: Mapping, first: int, last: int, whole: frozenset) -> tuple[tuple, dict]:
    """The arguments for the sequences from `first` to before `last`; those at `whole` are for all of them."""
    count = sequences_of(args, kwargs)

    def cut(key: int | str, x: object) -> object:
        mine = isinstance(x, Tensor) and x.ndim and len(x) == count and key not in whole
        return x[first:last] if mine else x

    return (
        tuple(cut(key, x) for key, x in enumerate(args)),
        {key: cut(key, x) for key, x in kwargs.items()},
    )


def of_all(root: nn.Module, args: tuple, kwargs: Mapping) -> frozenset:
    """Where (places and names) the arguments are that look as though they were by sequence and are not: positions [T] and
    masks [T, T] where there are as many tokens as sequences. That is tried on two sequences: what goes by sequence then
    has two rows, and what does not lacks some.
    """
    main, count = first_of(args, kwargs), sequences_of(args, kwargs)
    alike = {
        key: x
        for key, x in [*enumerate(args), *kwargs.items()]
        if isinstance(x, Tensor) and x is not main and x.ndim and len(x) == count
    }
    by_shape = main.ndim > 1 and main.shape[1] != count
    doubtful = [key for key, x in alike.items() if not (by_shape and x.shape[:2] == main.shape[:2])]
    if count < 3 or not doubtful:
        return frozenset()
    return next((each for each in _choices(doubtful) if _goes(root, args, kwargs, each)), frozenset())


def _choices(keys: list) -> Iterator[frozenset]:
    for count in range(min(len(keys), _TRIED) + 1):
        yield from map(frozenset, itertools.combinations(keys, count))


@torch.no_grad()
def _goes(root: nn.Module, args: tuple, kwargs: Mapping, whole: frozenset) -> bool:
    some, named = taken(args, kwargs, 0, 2, whole)
    try:
        root(*some, **named)
    except Exception:  # whatever a model makes of what it is given
        return False
    return True
