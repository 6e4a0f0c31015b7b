"""A norm that feeds a layer: what a gradient of its output is worth at its input, by the formula."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from probes.parallel import local

_CLOSE, _CLOSE_WHEN_SMALL = 1e-4, 1e-3
_LARGE, _SMALL = 1e3, 1e-3
_MOST = 10.0  # of eps; with a larger one it scales rather than normalises
_TRIED = {0.1: _CLOSE, 1.0: _CLOSE, 30.0: _CLOSE, 3e-3: _CLOSE_WHEN_SMALL}  # scales of a trial input


@dataclass(frozen=True)
class Norm:
    """y = gain · (x − m) / sqrt(mean((x − m)²) + eps), for each token; m is the mean over channels where it is
    `centred`, else 0. The gain is `plus` added to the parameter `gain` of the module, or `plus` alone."""

    module: nn.Module
    centred: bool
    gain: str | None
    plus: float
    eps: float

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to `x` [N, D], float32 or wider, of one [N, D] with respect to y."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, gradient = x.to(wide), gradient.to(wide)
        if self.gain is not None:
            gradient = gradient * (local(getattr(self.module, self.gain)).detach().to(wide) + self.plus)
        elif self.plus != 1:
            gradient = gradient * self.plus
        if self.centred:
            x, gradient = (each - each.mean(-1, keepdim=True) for each in (x, gradient))
        size = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        x = x * size
        return (gradient - x * (gradient * x).mean(-1, keepdim=True)) * size


@torch.no_grad()
def understood(module: nn.Module) -> Norm | None:
    """The norm that `module` is, found by trying it (RMSNorm and LayerNorm, whatever they are called); None where
    it is another or none."""
    try:
        return _tried(module)
    except Exception:  # whatever a stranger's module makes of it
        return None


def _tried(module: nn.Module) -> Norm | None:
    own = dict(module.named_parameters())
    vectors = {name: p for name, p in own.items() if p.ndim == 1 and "." not in name}
    named = "norm" in type(module).__name__.lower()
    if len(vectors) < len(own) or len({p.shape for p in vectors.values()}) > 1 or not (own or named):
        return None
    some = next(iter(vectors.values()), None)
    (width,) = some.shape if some is not None else getattr(module, "normalized_shape", (16,))
    # Without what spreads its parameters over processes.
    spread = [p for p in own.values() if isinstance(p, DTensor)]
    whole = {id(p): nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device)) for p in spread}
    twin = copy.deepcopy(module, whole).eval()
    if some is not None and some.dtype.itemsize < 4:
        twin = twin.float()
    like = next(twin.parameters(), torch.zeros(()))
    drawn = torch.Generator().manual_seed(0)
    given = (torch.randn(4, width, generator=drawn) + 0.5).to(like.device, like.dtype)
    for vector in twin.parameters():  # so that they can be told apart
        vector.copy_(torch.randn(width, generator=drawn))
    shift = twin.forward(torch.zeros_like(given))

    def called(scale: float) -> Tensor:
        return twin.forward(scale * given) - shift

    for centred in (False, True):
        x = given - given.mean(-1, keepdim=True) if centred else given
        squares = x.square().mean(-1, keepdim=True)
        # Where it is large, eps does nothing: that leaves the gain. Where it is small, eps is what is left to explain.
        gain = (called(_LARGE) * squares.sqrt() / x).median(0).values
        sizes = (gain * _SMALL * x / called(_SMALL)).square() - _SMALL**2 * squares
        eps = max(float(sizes[sizes.isfinite()].median()), 0.0) if gain.any() else 0.0
        good = all(
            torch.allclose(
                called(scale),
                gain * scale * x * (scale**2 * squares + eps).rsqrt(),
                rtol=close,
                atol=close * float(gain.abs().max()),
            )
            for scale, close in _TRIED.items()
        )
        source = _named(gain, dict(twin.named_parameters()))
        if good and eps < _MOST and source is not None:
            return Norm(module, centred, *source, eps)
    return None


def _named(gain: Tensor, vectors: dict[str, Tensor]) -> tuple[str | None, float] | None:
    """The parameter that the gain is, and what is added to it; None where it is neither one nor a constant."""
    for name, vector in vectors.items():
        for plus in (0.0, 1.0):  # Gemma's is one plus its parameter
            if torch.allclose(gain, vector + plus, rtol=_CLOSE, atol=_CLOSE):
                return name, plus
    if not vectors and torch.allclose(gain, gain[:1].expand_as(gain), rtol=_CLOSE):
        return None, round(float(gain[0]), 4)
    return None
