"""What a kernel that shows no operation weighs its sources with: by the definition of a depth read, where a trial with
random values says that it follows it, else by least squares."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from probes.tape import Node, mapped

_AT_ONCE = 1024  # tokens that are solved in float64 at a time
_TOLERANCE = 2e-2  # of a trial: kernels round to bfloat16
_EPS = 1e-6


class Law(NamedTuple):
    """The weights are softmax(scale · q·k), k the normalised (where `normed`) sources and q the product of the vectors in
    `query`, operands of the kernel by slot. With a `gain`, a slot or -1 for none, the mix comes out normalised."""

    query: tuple[int, ...]
    normed: bool
    scale: float
    eps: float
    gain: int | None

    @property
    def slots(self) -> tuple[int, ...]:
        return self.query if self.gain in (None, -1) else (*self.query, self.gain)


def by_definition(law: Law, sources: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights [S, ...] and what the kernel makes of S sources [..., D]; `vectors` are those of `law.slots`."""
    values = torch.stack(list(sources))
    wide = values.double() if values.dtype == torch.float64 else values.float()
    keys = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + law.eps) if law.normed else wide
    query = wide.new_full(wide.shape[-1:], law.scale)
    for vector in vectors[: len(law.query)]:
        query = query * vector.flatten().to(wide.dtype)
    weights = (keys * query).sum(-1).softmax(0)
    mix = (weights.unsqueeze(-1) * wide).sum(0)
    if law.gain is not None:
        mix = mix * torch.rsqrt(mix.square().mean(-1, keepdim=True) + law.eps)
        if law.gain >= 0:
            mix = mix * vectors[-1].flatten().to(wide.dtype)
    return weights, mix.to(values.dtype)


def law_of(node: Node, sources: Sequence[Node], width: int) -> Law | None:
    """The law that a kernel follows when it is called with random vectors in place of its own; None for another one."""
    vectors = [slot for slot, each in enumerate(node.slots) if _is_vector(each, width)]
    values = [each.value for each in node.slots]
    generator = torch.Generator().manual_seed(0)
    for slot in vectors:
        like = values[slot]
        drawn = torch.randn(like.shape, generator=generator)
        values[slot] = drawn.to(like.device, like.dtype)
    try:
        with torch.no_grad():
            made = node.call(values)
    except Exception:  # a kernel may refuse in a way of its own
        return None
    given = [source.value for source in sources]
    for law in _laws(vectors, _numbers(node), width):
        found = by_definition(
            law, [x.reshape(-1, width) for x in given], [values[slot] for slot in law.slots]
        )[1]
        apart = (found.float() - made.reshape(-1, width).float()).norm()
        if apart < _TOLERANCE * made.float().norm():
            return law
    return None


def _is_vector(node: Node, width: int) -> bool:
    x = node.tensor
    return x.is_floating_point() and x.numel() == width and x.shape[-1:].numel() in (1, width) and x.ndim <= 2


def _numbers(node: Node) -> list[float]:
    numbers: list[float] = []
    mapped((node.args, node.kwargs), numbers.append, float)
    return numbers


def _laws(vectors: Sequence[int], numbers: Sequence[float], width: int) -> Iterator[Law]:
    """What may be tried, the paper's own form first."""
    eps = min((n for n in numbers if 0 < n < 1e-2), default=_EPS)
    scales = dict.fromkeys([1.0, width**-0.5, *(n for n in numbers if n >= 1e-2)])
    for scale in scales:
        for normed in (True, False):
            for count in (2, 1):
                for query in combinations(vectors, min(count, len(vectors))):
                    rest = [slot for slot in vectors if slot not in query]
                    for gain in (None, *rest, -1):
                        if query:
                            yield Law(query, normed, scale, eps, gain)


def certain(sources: list[Tensor], mix: Tensor) -> Tensor:
    """`solved`, but NaN where the rounding of the mix could have moved the mean of a weight over tokens, by three
    standard deviations, by more than 1e-4 (of a mix in 16 bits 2e-2): the sources are alike, or one is tiny."""
    width, tokens = mix.shape[-1], mix[..., 0].numel()
    eps = torch.finfo(mix.dtype).eps
    values = torch.stack([source.reshape(-1, width) for source in sources], 1).double()
    size = values.norm(dim=-1, keepdim=True)
    unit = values / size
    inflation = torch.linalg.inv_ex(unit @ unit.mT)[0].diagonal(dim1=-2, dim2=-1)
    # As in mixing.py: a quarter of the epsilon, of which as much is seen as there are channels in the sources' span.
    moved = inflation.sqrt() * mix.reshape(-1, width).double().norm(dim=-1, keepdim=True) / size.squeeze(-1)
    spread = 3 * eps / 4 * (len(sources) / width) ** 0.5 * moved.square().sum(0).sqrt() / tokens
    known = (spread <= (2e-2 if eps > 1e-5 else 1e-4)).all()
    return solved(sources, mix).where(known, torch.nan)


def solved(sources: list[Tensor], mix: Tensor) -> Tensor:
    """The weights [S, B, T] that bring the sum of sources nearest to a mix [B, T, D], for each token by itself."""
    weights = []
    flat = [source.reshape(-1, mix.shape[-1]) for source in sources]
    for at in range(0, flat[0].shape[0], _AT_ONCE):
        values = torch.stack([source[at : at + _AT_ONCE] for source in flat], 1).double()  # [N, S, D]
        size = values.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        values = values / size
        target = mix.reshape(-1, mix.shape[-1])[at : at + _AT_ONCE].double().unsqueeze(-1)
        # Without a check of the result, which would wait for the device: what fails does not give the mix back.
        found = torch.linalg.solve_ex(values @ values.mT, values @ target)[0]
        weights.append((found / size).squeeze(-1))
    return torch.cat(weights).T.reshape(len(sources), *mix.shape[:-1]).float()
