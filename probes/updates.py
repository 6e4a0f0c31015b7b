"""How far an update moves each layer: an estimate, from a fixed sample of each layer's elements.

The sample is strided, so that the same elements are looked at before and after without an index over the model: half of
it is shared out evenly among a layer's parameters, half by their size, and each element counts for as many as it stands
for.
"""

from math import ceil, gcd

import torch
from torch import Tensor

from probes.parallel import Parallel
from probes.sites import Sites

UPDATE_RATIO = "update_ratio"
SAMPLE = 4096  # elements of a layer, about
_MOST_PARAMETERS = 64  # of a layer with more, as of many experts, some are looked at


class Updates:
    """`before` when the gradients of a step are there, `after` when its update is complete."""

    def __init__(self, sites: Sites, parallel: Parallel | None = None):
        self._layers = sites.layer_parameters()
        if parallel is not None:  # of what several processes hold, one tells
            self._layers = [[p for p in group if parallel.tells_of(p)] for group in self._layers]
        self._sampled: list[tuple[Tensor, int]] = []  # parameter and stride, those of one type together
        self._index, self._weight = self._shared_out()
        self._step: int | None = None
        self._flat: Tensor | None = None
        self._versions: list[int] = []
        self._since: tuple[int, Tensor, list[int]] | None = None  # step, sample and versions after an update

    def _shared_out(self) -> tuple[Tensor, Tensor]:
        """Where the sample of each layer is in what `_gathered` returns, [layers × most] (its last element, a zero, where
        there is nothing), and the root of how many elements each stands for, likewise."""
        shares = [(row, *share) for row, group in enumerate(self._layers) for share in _shares(group)]
        shares.sort(key=lambda share: str(share[1].dtype))
        self._sampled = [(parameter, stride) for _, parameter, stride, _ in shares]
        places: list[list[Tensor]] = [[] for _ in self._layers]
        weights: list[list[Tensor]] = [[] for _ in self._layers]
        start = 0
        for row, parameter, stride, stands_for in shares:
            count = ceil(_local(parameter).numel() / stride)
            places[row].append(torch.arange(start, start + count, dtype=torch.int32))
            weights[row].append(torch.full((count,), stands_for**0.5))
            start += count
        most = max((sum(map(len, each)) for each in places), default=0)
        index = torch.full((len(self._layers), most), start, dtype=torch.int32)
        weight = torch.zeros(len(self._layers), most)
        for row in range(len(self._layers)):
            if places[row]:
                here = torch.cat(places[row])
                index[row, : len(here)], weight[row, : len(here)] = here, torch.cat(weights[row])
        return index.flatten(), weight.flatten()

    @property
    def nbytes(self) -> int:
        """Memory held on the device, in bytes."""
        return self._index.nbytes + self._weight.nbytes + 2 * 4 * self._index.numel()

    @torch.no_grad()
    def before(self, step: int) -> None:
        """The parameters are those that step `step` began with. Where the step before was looked at and nobody has
        written to them since, as far as autograd can tell, they are those it ended with."""
        if self._sampled and self._step != step:
            self._step, versions = step, self._versions_now()
            same = self._since is not None and self._since[0] == step and self._since[2] == versions
            self._flat = self._since[1] if same else self._gathered()
            self._versions, self._since = versions, None

    @torch.no_grad()
    def after(self, step: int) -> dict[str, Tensor]:
        """update_ratio, float32 [L] on the device, NaN where a layer has no parameters or only zeros; nothing where it is
        not known what the parameters were before, as where optimizers step within backward."""
        return ratio_of(self.sums(step))

    @torch.no_grad()
    def sums(self, step: int) -> dict[str, Tensor]:
        """The squares that the ratio is made of, float32 [L] each, of what this process holds: "moved" and "size"."""
        if self._step != step or self._flat is None:
            return {}
        before, self._flat = self._flat, None
        now, versions = self._gathered(), self._versions_now()
        if versions != self._versions:
            self._since = step + 1, now, versions
        both = torch.stack([now - before, before]).float()
        if self._index.device != both.device:
            self._index, self._weight = self._index.to(both.device), self._weight.to(both.device)
        both = both.index_select(1, self._index).mul_(self._weight).view(2, len(self._layers), -1)
        moved, size = torch.linalg.vector_norm(both, dim=2)
        if self._versions == versions:
            # Nobody wrote to them, as far as autograd can tell: either through `.data`, or before we looked.
            moved = moved.where(moved.any(), torch.nan)
        return {"moved": moved * moved, "size": size * size}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `sums` gives."""
        return dict.fromkeys(("moved", "size"), (len(self._layers),))

    def _gathered(self) -> Tensor:
        """The sampled elements, float32 (or wider), and a zero."""
        parts: dict[torch.dtype, list[Tensor]] = {}
        for parameter, stride in self._sampled:
            part = _local(parameter).detach().reshape(-1)[::stride]
            parts.setdefault(part.dtype, []).append(part)
        flat = [torch.cat(each) for each in parts.values()]
        zero = torch.zeros(1, device=flat[0].device)
        return torch.cat([*flat, zero])

    def _versions_now(self) -> list[int]:
        return [parameter._version for parameter, _ in self._sampled]


def ratio_of(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """update_ratio from the squares of everybody."""
    if not sums:
        return {}
    return {UPDATE_RATIO: (sums["moved"] / sums["size"]).sqrt().where(sums["size"] != 0, torch.nan)}


def _shares(group: list[Tensor]) -> list[tuple[Tensor, int, float]]:
    """Of a layer's parameters those that are looked at, each with its stride and how many elements one stands for."""
    group = [p for p in group if _local(p).numel()]
    every = sum(_local(p).numel() for p in group)
    group = group[:: ceil(len(group) / _MOST_PARAMETERS)] if group else []
    sizes = [_local(p).numel() for p in group]
    shares = []
    for parameter, size in zip(group, sizes, strict=True):
        wanted = SAMPLE / 2 / len(group) + SAMPLE / 2 * size / sum(sizes)
        stride = _stride(size, wanted, _local(parameter).shape[-1] if parameter.ndim else 1)
        shares.append((parameter, stride, size / ceil(size / stride) * every / sum(sizes)))
    return shares


def _stride(size: int, wanted: float, row: int) -> int:
    """For about `wanted` of `size` elements; it shares no divisor with the length of a row, so that every column is met."""
    stride = max(1, int(size / wanted))
    while gcd(stride, row) > 1:
        stride += 1
    return stride


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
