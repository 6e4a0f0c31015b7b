"""Depth edges under a gradient: what the loss would be without a source in a read, to first order.

An edge is what one read takes from one source. Without it the mix h lacks w·v, so that the loss changes by −⟨∂L/∂h, w·v⟩,
summed over tokens. In a baseline the edge to a layer is that of its branch alone: ∂L/∂h is then the gradient that
comes back through the layer's norm (norms.py), not the stream's, which carries every later path too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

EDGE_METRICS = ("depth_attribution",)
ELEMENTS = 2**20
"""Of each source in a forward. More channels mean fewer tokens."""

_STEP = 0.6180339887498949  # multiples of it, without their whole parts, are spread evenly


class EdgeSums:
    """Sums over tokens for `given` sources of each read, out of `columns`; a tensor for each row, with the number
    of tokens at its end, for the reason that RowMoments has."""

    def __init__(self, given: Sequence[int], exists: Tensor, device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.rows = [torch.zeros(n + 1, device=device, dtype=wide) for n in given]
        self._columns = exists.shape[1]
        # On the host, so that packing needs no device-side count.
        self._cells = exists.flatten().nonzero().flatten().to(device)

    @property
    def count(self) -> Tensor:
        return torch.stack([row[-1] for row in self.rows])

    def tensors(self) -> list[Tensor]:
        return list(self.rows)

    def finish(self, seen: Tensor) -> Tensor:
        """float32 [cells], NaN for a read that is not among the `seen` (bool [R])."""
        dense = torch.stack(
            [pad(row[:-1], (0, self._columns + 1 - len(row)), value=torch.nan) for row in self.rows]
        )
        return dense.where(seen[:, None], torch.nan).flatten()[self._cells].float()


def add_edges(
    sums: Tensor,
    gradient: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    """Add one read to its `sums` [S+1]: the gradient of its mix [N, D], its sources S times [N, D], their weights
    [S, N] (None: one). Of a `mask` (bool [N]) only the true tokens count; `scale` is how many tokens each stands for."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    gradient = gradient.detach().to(wide)
    along = torch.stack([(gradient * source).sum(-1) for source in sources])
    if weight is not None:
        along = along * weight
    if mask is not None:
        along = along.where(mask, 0)
    sums[:-1].sub_(along.sum(1, dtype=sums.dtype), alpha=scale)
    sums[-1:].add_(gradient.shape[0] if mask is None else mask.sum())


def few(x: Tensor, offset: Tensor) -> Tensor | None:
    """Which tokens of `x` [..., D] are looked at, int64 [N]: one out of each of N equal stretches, so that all are
    as likely when `offset` [] (0 to 1) is drawn anew each time. None: all, where there are not too many."""
    width = max(x.shape[-1], 1)
    total, count = x.numel() // width, max(1, ELEMENTS // width)
    if total <= count:
        return None
    place = torch.arange(count, device=x.device, dtype=offset.dtype)
    return ((place + (place * _STEP + offset).frac()) * (total / count)).long().clamp_max(total - 1)


def taken(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Those tokens of `x` [..., D], as a copy [N, D]: a model may write to its own tensor afterwards."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x.clone() if tokens is None else x[tokens]
