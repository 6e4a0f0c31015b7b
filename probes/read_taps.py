"""What the replays of found reads need of a forward: tensors kept as hooks meet them, until the read is computed."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from probes.found import FoundRead, FoundReads
from probes.identity import tolerance
from probes.sites import reached

_TOKENS = 8


@dataclass
class _Here:
    """What is to be done at one side of a module's calls: tensors to keep (turn, path, number), reads to compute."""

    keep: list[tuple[int, tuple, int]] = field(default_factory=list)
    compute: list[tuple[int, int]] = field(default_factory=list)


class ReadTaps:
    """`places` says where hooks are wanted and what to call there; `forget` ends a forward.

    Each read is handed to `computed(row, weights [S, B, T], sources, state, mix, error, allowed)`: `state` is the model's
    own mix of those sources, None where it is not seen or the mix is of others, `mix` the one computed where only that is
    not seen; then how far weights times sources are from the state, relative, on a few tokens, and how far they may be.
    """

    def __init__(self, found: FoundReads, computed: Callable):
        self._reads = found.reads
        self._computed = computed
        here: dict[tuple[nn.Module, bool], _Here] = defaultdict(_Here)
        numbers: dict[tuple, int] = {}
        last: dict[int, int] = {}
        self._needs: list[list[int]] = [[] for _ in self._reads]
        for row, read in sorted(enumerate(self._reads), key=lambda each: each[1].when.place):
            needs = self._needs[row]
            for spot in read.replay.spots:
                key = spot.module, spot.turn, spot.before, spot.path
                if key not in numbers:
                    numbers[key] = len(numbers)
                    here[spot.module, spot.before].keep.append((spot.turn, spot.path, numbers[key]))
                needs.append(numbers[key])
                last[numbers[key]] = row
            here[read.when.module, read.when.before].compute.append((read.when.turn, row))
        self._here = dict(here)
        self._done_after = [
            [number for number, at in last.items() if at == row] for row in range(len(self._reads))
        ]
        self._kept: dict[int, Tensor] = {}
        self._turns: dict[int, int] = {}

    def places(self) -> Iterator[tuple[nn.Module, bool, Callable[[object], None]]]:
        for number, ((module, before), here) in enumerate(self._here.items()):
            yield module, before, lambda tree, here=here, number=number: self._met(tree, here, number)

    def forget(self) -> None:
        self._kept.clear()
        self._turns.clear()

    def _met(self, tree: object, here: _Here, number: int) -> None:
        turn = self._turns.get(number, 0)
        self._turns[number] = turn + 1
        for wanted, path, key in here.keep:
            if wanted == turn:
                tensor = reached(tree, path)
                if isinstance(tensor, Tensor):
                    self._kept[key] = tensor.detach()
        for wanted, row in here.compute:
            if wanted == turn:
                self._compute(row, tree)

    def _compute(self, row: int, tree: object) -> None:
        read = self._reads[row]
        if all(number in self._kept for number in self._needs[row]):
            with torch.no_grad():
                seen = [self._kept[number] for number in self._needs[row]]
                weights, sources, mix, made = read.replay.weights(seen)
                state = reached(tree, read.state.path) if read.state is not None else None
                if read.state is not None and not isinstance(state, Tensor):
                    return  # it cannot be checked
                error, allowed = _error(read, weights, sources, mix, mix if state is None else state)
                if read.witness is not None:
                    error = torch.maximum(error, _apart(made, reached(tree, read.witness.path)))
            if read.replay.normalised:
                state, mix = None, None
            elif state is not None:
                mix = None
            self._computed(row, weights, sources, state, mix, error, allowed)
        for number in self._done_after[row]:
            self._kept.pop(number, None)


def _error(
    read: FoundRead, weights: Tensor, sources: list[Tensor], mix: Tensor, state: Tensor
) -> tuple[Tensor, float]:
    """How far weights times sources are from the state on the first tokens, relative; of normalised sources, how far
    the mix computed again is. And what rounding alone may do."""
    if read.replay.normalised:
        made = mix
    else:
        parts = torch.stack([_few(source) for source in sources])
        made = (weights.flatten(1)[:, :_TOKENS].unsqueeze(-1).float() * parts).sum(0)
    dtypes = {weights.dtype, mix.dtype, state.dtype, *(source.dtype for source in sources)}
    coarsest = max(dtypes, key=lambda each: torch.finfo(each).eps)
    return _apart(made, state), tolerance(coarsest)


def _apart(made: Tensor, seen: Tensor) -> Tensor:
    """How far apart two tensors are on the first tokens, relative."""
    made, seen = _few(made), _few(seen.detach())
    return (made - seen).norm() / seen.norm().clamp_min(torch.finfo(torch.float32).tiny)


def _few(x: Tensor) -> Tensor:
    return x.flatten(0, -2)[:_TOKENS].float()
