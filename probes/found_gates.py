"""Gates on the reads of a model that does not say where they are: each mix is changed where a hook meets it."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from probes.found import FoundReads
from probes.sites import put, reached


class FoundGates:
    """`hang` keeps what the replays of the reads need of a forward, with its gradient, and where a mix is seen puts
    `mixed(row, sources S times [B, T, D], weights S times [B, T], mix)` in its stead. `forget` ends a forward."""

    def __init__(self, found: FoundReads, mixed: Callable[[int, list[Tensor], list[Tensor], Tensor], Tensor]):
        self._reads, self._mixed = found.reads, mixed
        # What is to be done at one side of a module's calls: tensors to keep (turn, path, key), reads to change.
        self._keep: dict[tuple[nn.Module, bool], set] = defaultdict(set)
        self._change: dict[tuple[nn.Module, bool], list] = defaultdict(list)
        for row, read in enumerate(self._reads):
            if read.state is None:
                continue  # of one source, or Gates refuses
            for spot in read.replay.spots:
                self._keep[spot.module, spot.before].add((spot.turn, spot.path, _key(spot)))
            self._change[read.state.module, read.state.before].append((read.state.turn, row))
        self._kept: dict[tuple, Tensor] = {}
        self._turns: dict[tuple, int] = {}

    def forget(self) -> None:
        self._kept.clear()
        self._turns.clear()

    def hang(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for module, before in {**self._keep, **self._change}:
            if before:
                yield module.register_forward_pre_hook(
                    lambda module, args, kwargs: self._met(module, True, (args, kwargs)), with_kwargs=True
                )
            else:
                yield module.register_forward_hook(
                    lambda module, args, output: self._met(module, False, output)
                )

    def _met(self, module: nn.Module, before: bool, tree: object) -> object:
        here = module, before
        turn = self._turns.get(here, 0)
        self._turns[here] = turn + 1
        self._look(here, turn, tree)
        for wanted, row in self._change.get(here, ()):
            if wanted == turn:
                tree = self._changed(row, tree)
                self._look(here, turn, tree)
        return tree

    def _look(self, here: tuple[nn.Module, bool], turn: int, tree: object) -> None:
        for wanted, path, key in self._keep.get(here, ()):
            if wanted == turn and isinstance(tensor := reached(tree, path), Tensor):
                self._kept[key] = tensor

    def _changed(self, row: int, tree: object) -> object:
        read = self._reads[row]
        needs = [_key(spot) for spot in read.replay.spots]
        state = reached(tree, read.state.path)
        if isinstance(state, Tensor) and all(key in self._kept for key in needs):
            weights, sources, *_ = read.replay.weights([self._kept[key] for key in needs])
            return put(tree, read.state.path, self._mixed(row, sources, list(weights), state))
        return tree


def _key(spot) -> tuple:
    return id(spot.module), spot.turn, spot.before, spot.path
