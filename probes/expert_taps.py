"""Counts of the tokens that each expert gets, on the device, and the shares they make."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from probes.experts import Experts, chosen
from probes.masks import fitting

EXPERT_METRICS = ("expert_load", "expert_balance")

Counts = Callable[[Tensor, tuple, dict, Tensor | None], None]


class ExpertTaps:
    """Hangs counts on the `taps` of a model (taps.py), before experts are given their tokens.

    The table `taps.experts` is int64 [layer, E + 2]: assignments to each expert, to none of them, and tokens that came in.
    """

    def __init__(self, experts: Sequence[Experts | None], taps):
        self._experts, self._taps = list(experts), taps
        self._most = most(experts)

    def attach(self) -> None:
        for module, count in self._places():
            self._taps.before(module, lambda args, kwargs, count=count: self._given(count, args, kwargs))

    def _given(self, count: Counts, args: tuple, kwargs: dict) -> None:
        taps = self._taps
        if not taps.matrices or taps.recomputing:
            return
        if torch.compiler.is_compiling():
            count(taps.experts, args, kwargs, taps.mask)
        else:
            taps.eagerly(lambda: count(taps.experts, args, kwargs, taps.mask), *EXPERT_METRICS)

    def _places(self) -> Iterator[tuple[nn.Module, Counts]]:
        for row, experts in enumerate(self._experts):
            if experts is None:
                continue
            if experts.stacked:
                yield experts.modules[0], self._of_stack(row, experts.count)
                continue
            yield experts.holder, self._of_tokens(row, self._most + 1)
            for place, module in enumerate(experts.modules):
                yield module, self._of_tokens(row, place)

    def _of_stack(self, row: int, count: int) -> Counts:
        most = self._most

        def add(table: Tensor, args: tuple, kwargs: dict, mask: Tensor | None) -> None:
            choice = chosen((*args, *kwargs.values()))
            if choice is None:
                return
            fits = fitting(mask, choice)
            if choice.shape[-1] == count:  # a mask over the experts
                taken = choice.flatten(0, -2) != 0
                if fits is not None:
                    taken = taken & fits.flatten().unsqueeze(-1)
                table[row, :count].add_(taken.sum(0))
                return
            choice = choice.flatten(0, -2).long()
            counts = ((choice >= 0) & (choice < count)).long()
            choice = choice.where(counts != 0, most)
            ones = torch.ones_like(choice)
            if fits is not None:
                ones = ones * fits.flatten().unsqueeze(-1)
            table[row].index_add_(0, choice.flatten(), ones.flatten())

        return add

    def _of_tokens(self, row: int, place: int) -> Counts:
        def add(table: Tensor, args: tuple, kwargs: dict, mask: Tensor | None) -> None:
            x = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            if x is not None and x.ndim:  # a buffer of a fixed capacity is filled up with zeros
                table[row, place].add_((x.detach() != 0).any(-1).sum())

        return add


def most(experts: Sequence[Experts | None]) -> int:
    """The number of experts of the layer with most."""
    return max((each.count for each in experts if each is not None), default=0)


class Loads:
    """What the counts say, once a step is complete."""

    def __init__(self, experts: Sequence[Experts | None], device: torch.device):
        counts = [0 if each is None else each.count for each in experts]
        apart = [each is not None and not each.stacked for each in experts]
        self._count = torch.tensor(counts, device=device)
        self._apart = torch.tensor(apart, device=device)

    def finish(self, table: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """expert_load [L, E] and expert_balance [L], float32, NaN where nothing is known; and the assignments [L]. Where
        each expert of a list gets all tokens, the list does not say whom the router chose."""
        load = table[:, :-2]
        exists = torch.arange(load.shape[1], device=load.device) < self._count[:, None]
        dense = self._apart & ((load == table[:, -1:]) | ~exists).all(1)
        assigned = load.sum(1).where(~dense, 0)
        known = assigned > 0
        share = (load / assigned[:, None]).float().where(exists & known[:, None], torch.nan)
        entropy = torch.special.entr(share.where(exists, 0)).sum(1) / self._count.float().log()
        return {"expert_load": share, "expert_balance": entropy.where(known, torch.nan)}, assigned
