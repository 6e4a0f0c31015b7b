"""A depth read by another package's fused kernel, on CUDA: flash-linear-attention's, or else Liger's.

Nobody has to ask for it: where one is installed it is tried once per process and device against the definition, mix,
weights and every gradient, and used from then on. One that differs or fails is left alone, with one warning.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnres import definition

Read = Callable[[Sequence[Tensor], Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From the sources, S of [B, T, D], the query [D], the key norm's gain [D] and its eps to mix and weights [S, B, T]."""

DEVICES = ("cuda",)
# The kernels compute in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Older Liger kernels leave out the sources after these without a word.
LIGER_SOURCES = 32
# Liger's kernels count the elements of a stack in 32 bits: beyond, they would read and write elsewhere.
LIGER_ELEMENTS = 2**31 - 1
# FLA's kernel tells the compiler that every token's channels begin at a multiple of so many bytes.
FLA_ALIGNMENT = 16
TOLERANCE = 1e-4


def fused_read(sources: Sequence[Tensor], most: int = 1) -> Read | None:
    """The fused read for these sources, and for reads of up to `most`; None where they are to be read without one.

    That is so on other devices, in float64, with sources of several dtypes, and while compiling: the compiler fuses
    our own read, and has not been shown to take these kernels. The weights of a fused read carry no gradient.
    """
    first = sources[0]
    if first.device.type not in DEVICES or torch.compiler.is_compiling():
        return None
    if first.dtype not in DTYPES or any(source.dtype != first.dtype for source in sources):
        return None
    for name, read in _checked(first.device):
        if _fits(name, first, max(most, len(sources))):
            return read
    return None


def _fits(name: str, source: Tensor, count: int) -> bool:
    """Whether a package's kernel takes reads of `count` such sources: no kernel checks this by itself."""
    if name == "liger_kernel":
        return count <= LIGER_SOURCES and count * source.numel() <= LIGER_ELEMENTS
    return source.shape[-1] * source.element_size() % FLA_ALIGNMENT == 0


def fla() -> Read:
    """The kernel of flash-linear-attention (fla-core 0.6)."""
    from fla.ops.attnres import fused_attnres

    def read(sources: Sequence[Tensor], query: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return fused_attnres(query, sources, gain, rms_eps=eps, return_weights=True)

    return read


def liger() -> Read:
    """The kernels of Liger (liger-kernel 0.8), with the weights that its own function keeps to itself."""
    from liger_kernel.ops.attn_res import attn_res_backward, attn_res_forward

    class LigerRead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query: Tensor, gain: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, Tensor]:
            # Triton launches on the current device, whichever the tensors are on.
            with torch.cuda.device_of(query):
                mix, _, weight, inverse_rms = attn_res_forward(torch.stack(sources), query, gain, eps)
            # Not its stack, which would keep every source once more for each of its reads.
            ctx.save_for_backward(query, gain, weight, inverse_rms, *sources)
            ctx.eps = eps
            rows = weight.T.reshape(len(sources), *mix.shape[:-1])
            ctx.mark_non_differentiable(rows)
            return mix, rows

        @staticmethod
        def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
            query, gain, weight, inverse_rms, *sources = ctx.saved_tensors
            stack = torch.stack(sources).flatten(1, -2)
            with torch.cuda.device_of(query):
                grads, grad_query, grad_gain = attn_res_backward(
                    grad, stack, query, gain, weight, inverse_rms, ctx.eps
                )
            return grad_query, grad_gain, None, *(each.view_as(grad) for each in grads.unbind(0))

    return lambda sources, query, gain, eps: LigerRead.apply(query, gain, eps, *sources)


PACKAGES: dict[str, Callable[[], Read]] = {"fla": fla, "liger_kernel": liger}
"""In the order in which they are preferred: FLA's reads the sources where they are, Liger's has them stacked."""


@functools.cache
def _checked(device: torch.device) -> list[tuple[str, Read]]:
    """The reads of the packages that are installed and right on this device."""
    right = []
    for name, load in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            read = load()
            difference = largest_difference(read, device)
        # A kernel that does not compile, a package of another version: whatever it is, we can do without.
        except Exception as error:
            warnings.warn(
                f"{name} is not used for depth reads: {type(error).__name__}: {error}", stacklevel=2
            )
            continue
        if difference <= TOLERANCE:
            right.append((name, read))
        else:
            warnings.warn(
                f"{name} is not used for depth reads: on {device} its kernel differs from the definition by "
                f"{difference:.1e}.",
                stacklevel=2,
            )
    return right


@torch.inference_mode(False)
@torch.enable_grad()
def largest_difference(read: Read, device: torch.device) -> float:
    """Of a small read from the definition: relative, in its mix, its weights or any gradient; NaN if any is."""
    # Said in full, for somebody may have set another default device or dtype.
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu", "dtype": torch.float32}
    given = [torch.randn(2, 5, 64, **drawn) for _ in range(3)]
    given += [torch.randn(64, **drawn) for _ in range(2)]

    def tried(read: Read, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in given]
        *sources, query, gain = leaves
        mix, weight = read(sources, query, gain, 1e-6)
        found = (mix, weight, *torch.autograd.grad(mix.square().sum(), leaves))
        return [x.detach().cpu().double() for x in found]

    def defined(sources: Sequence[Tensor], query: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return definition.depth_attention(query * gain, sources, eps)

    with torch.autocast(device.type, enabled=False):
        pairs = zip(tried(read, device, torch.float32), tried(defined, "cpu", torch.float64), strict=True)
        # A stack, for Python's max would step over NaN.
        return torch.stack([(ours - exact).norm() / exact.norm() for ours, exact in pairs]).max().item()
