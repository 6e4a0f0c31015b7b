"""The statistics of depth, as sums on the device: update per tensor, add up, finish once per step.

Everything is a running sum, so micro-batches merge by themselves and `finish` of the sum is the statistic of
the whole. Nothing here reads a number back to the host.
"""

import torch
from torch import Tensor

from probes.edges import EdgeSums
from probes.parallel import local


class Moments:
    """Sum of squares and count of elements for `rows` tensors of any shape: their RMS."""

    def __init__(self, rows: int, device: torch.device):
        self.squares = torch.zeros(rows, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.squares, self.count]

    def finish(self) -> Tensor:
        """RMS of each row, float32 [rows]; NaN for a row that saw nothing."""
        return (self.squares / self.count).sqrt()


class RowMoments:
    """The same with a tensor of its own for each row, [squares, count].

    For gradients: where a model is compiled in several graphs, the backward of each has saved what it writes to, and
    autograd lets nobody else write there meanwhile.
    """

    def __init__(self, rows: int, device: torch.device):
        self.rows = [torch.zeros(2, device=device) for _ in range(rows)]

    @property
    def count(self) -> Tensor:
        return torch.stack(self.rows)[:, 1]

    def tensors(self) -> list[Tensor]:
        return list(self.rows)

    def finish(self) -> Tensor:
        """RMS of each row, float32 [rows]; NaN for a row that saw nothing."""
        squares, count = torch.stack(self.rows).unbind(1)
        return (squares / count).sqrt()


def add_moments(x: Tensor, squares: Tensor, count: Tensor, mask: Tensor | None = None) -> None:
    """Add `x` to one row's `squares` and `count`: one pass over it, accumulated in float32 whatever its type.

    Of a `mask` (bool, the leading axes of `x`) only the true tokens count, whatever the others hold.
    """
    x = local(x)
    if mask is None:
        norm = norm_of(x)
        squares.addcmul_(norm, norm)
        count.add_(x.numel())
    else:
        norm = norm_of(x.flatten(mask.ndim), dim=-1)
        squares.add_((norm * norm).where(mask, 0).sum())
        count.add_(mask.sum() * (x.numel() // max(mask.numel(), 1)))


def add_nonfinite(x: Tensor, count: Tensor, row: int, mask: Tensor | None = None) -> None:
    """Add the number of infinite and not-a-number elements of `x` to row `row`."""
    wrong = ~torch.isfinite(local(x))
    if mask is not None:
        wrong = wrong.flatten(mask.ndim) & mask.unsqueeze(-1)
    count[row].add_(wrong.sum())


def norm_of(x: Tensor, dim: int | None = None) -> Tensor:
    """L2 norm, float32, accumulated in float32 or, of a float64 tensor, in float64."""
    dtype = None if x.dtype == torch.float64 else torch.float32
    if dim is None and x.device.type == "cpu" and x.ndim > 1:
        # On the CPU a whole tensor is summed one by one: of 50 million elements the norm is off by 0.4 %. Row by row
        # it is off by 1e-6, and as quick.
        x, dtype = torch.linalg.vector_norm(x, dim=-1, dtype=dtype), None
    return torch.linalg.vector_norm(x, dim=dim, dtype=dtype).float()


DEPTH_METRICS = (
    "depth_weight",
    "depth_weight_std",
    "contribution_rms",
    "depth_entropy",
    "depth_entropy_of_mean",
)


class DepthSums:
    """Sums over tokens of the depth weights of every read: mean, spread, entropy and contribution.

    Weights are centred on the even average 1/S before they are summed, and squares on the mean of those that come
    together: a small spread would otherwise drown in rounding.
    """

    def __init__(self, sources: list[int], device: torch.device):
        shape = (len(sources), max(sources))
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.centred = torch.zeros(shape, device=device, dtype=wide)
        self.squared = torch.zeros(shape, device=device, dtype=wide)
        self.contribution = torch.zeros(shape, device=device)
        self.entropy = torch.zeros(len(sources), device=device)
        self.tokens = torch.zeros(len(sources), dtype=torch.int64, device=device)
        self._sources = torch.tensor(sources, device=device, dtype=torch.float32)
        exists = torch.arange(shape[1]) < torch.tensor(sources)[:, None]
        # Flat positions of the cells that exist, computed on the host so that packing needs no device-side
        # count.
        self._cells = exists.flatten().nonzero().flatten().to(device)

    def tensors(self) -> list[Tensor]:
        return [self.centred, self.squared, self.contribution, self.entropy, self.tokens]

    def add(self, row: int, weight: Tensor, mean_squares: list[Tensor], mask: Tensor | None = None) -> None:
        """Add one read: weight [S, B, T] and the mean square over channels of each source, S times [B, T].

        Of a `mask` (bool [B, T]) only the true tokens count.
        """
        weight = local(weight.detach()).float().flatten(1)
        size = torch.stack(mean_squares).flatten(1)
        sources, tokens = weight.shape
        centred = weight - 1 / sources
        if mask is not None:
            # A padded token may hold anything, not-a-number too; zeros add nothing to any of the sums.
            mask, tokens = mask.flatten(), mask.sum()
            weight, size, centred = weight.where(mask, 0), size.where(mask, 0), centred.where(mask, 0)
        total = centred.sum(1)
        mean = total / max(tokens, 1) if mask is None else total / tokens.clamp_min(1)
        apart = centred - mean.unsqueeze(1)
        if mask is not None:
            apart = apart.where(mask, 0)
        wide = total.to(self.squared.dtype)
        self.centred[row, :sources].add_(wide)
        self.squared[row, :sources].add_((apart * apart).sum(1) + wide * mean)
        self.contribution[row, :sources].add_((weight * weight * size).sum(1))
        self.entropy[row].add_(_entr(weight).sum())
        self.tokens[row].add_(tokens)

    def finish(self) -> dict[str, Tensor]:
        """The depth metrics: triangles packed to [cells], the rest [R]; NaN for a read that saw nothing."""
        tokens = self.tokens[:, None]
        even = 1 / self._sources[:, None]
        mean_centred = self.centred / tokens
        mean = mean_centred + even
        variance = (self.squared / tokens - mean_centred**2).clamp_min(0).float()
        mean = mean.float()
        # ln(1) = 0: with a single source the entropy is 0/0, blank as it should be.
        largest = self._sources.log()
        exists = torch.arange(mean.shape[1], device=mean.device) < self._sources[:, None]
        entropy_of_mean = _entr(mean).where(exists, 0).sum(1)
        return {
            "depth_weight": self._pack(mean),
            "depth_weight_std": self._pack(variance.sqrt()),
            "contribution_rms": self._pack((self.contribution / tokens).sqrt()),
            "depth_entropy": self.entropy / self.tokens / largest,
            "depth_entropy_of_mean": entropy_of_mean / largest,
        }

    def _pack(self, dense: Tensor) -> Tensor:
        return dense.flatten()[self._cells]


def _entr(weight: Tensor) -> Tensor:
    """-w ln w, zero for zero. torch.special.entr gives infinity for weights below 1e-38, which sharp reads have."""
    return -weight * weight.clamp_min(torch.finfo(weight.dtype).tiny).log()


def token_mean_square(x: Tensor) -> Tensor:
    """Mean square over channels, [..., D] -> float32 [...]."""
    x = local(x.detach())
    norm = norm_of(x, dim=-1)
    return norm * norm / x.shape[-1]


class Tables:
    """All sums of one model, empty: moments by place, forward and backward, non-finite counts, depth sums, depth edges."""

    def __init__(
        self,
        sizes: dict[str, int],
        sources: list[int],
        device: torch.device,
        experts: int = 0,
        edges: EdgeSums | None = None,
        layers: int = 0,
    ):
        self.edges = edges
        self.forward = {place: Moments(rows, device) for place, rows in sizes.items()}
        self.backward = {place: RowMoments(rows, device) for place, rows in sizes.items()}
        self.nonfinite = torch.zeros(sizes["state"], dtype=torch.int64, device=device)
        self.depth = DepthSums(sources, device) if sources else None
        shape = layers, experts + 2
        self.experts = torch.zeros(shape, dtype=torch.int64, device=device) if experts else None

    def forward_tensors(self) -> list[Tensor]:
        depth = self.depth.tensors() if self.depth is not None else []
        depth += [] if self.experts is None else [self.experts]
        return [self.nonfinite, *depth, *(t for moments in self.forward.values() for t in moments.tensors())]

    def backward_tensors(self) -> list[Tensor]:
        edges = self.edges.tensors() if self.edges is not None else []
        return [*edges, *(t for moments in self.backward.values() for t in moments.tensors())]

    def tensors(self) -> list[Tensor]:
        return [*self.forward_tensors(), *self.backward_tensors()]

    def reset(self) -> None:
        clear(self.tensors())


def merge(into: list[Tensor], part: list[Tensor]) -> None:
    """Add the sums of a part to those of the whole."""
    for mine, other in zip(_by_type(into), _by_type(part), strict=True):
        torch._foreach_add_(mine, other)


def clear(sums: list[Tensor]) -> None:
    for group in _by_type(sums):
        torch._foreach_zero_(group)


def _by_type(tensors: list[Tensor]) -> list[list[Tensor]]:
    # One kernel for many small tensors needs them of one type.
    types = dict.fromkeys(t.dtype for t in tensors)
    return [[t for t in tensors if t.dtype == each] for each in types]
