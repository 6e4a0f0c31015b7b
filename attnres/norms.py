"""Is this module of somebody's model a norm? Told by what it makes of some inputs, not by its class."""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from attnres.trying import first_tensor, forked_random_numbers


def is_norm(module: nn.Module, args: tuple, kwargs: dict, made: Tensor | None) -> bool:
    """Whether twice the input gives the same output: true for norms, and for nothing else that has only vectors."""
    if not _keeps(args, made) or any(parameter.ndim > 1 for parameter in module.parameters()):
        return False
    large = _large(args[0])
    with suppress(Exception):  # whatever it says to such an input
        one, two = _tried(module, [large, 2 * large], args, kwargs)
        # Dropout and activations differ by far more; constants are not norms.
        return bool((one - two).norm() <= 1e-3 * one.norm()) and bool(one.norm() > 0)
    return False


def is_adaptive_norm(module: nn.Module, args: tuple, kwargs: dict, made: Tensor | None) -> bool:
    """Whether it is a norm with matrices, that make scale and shift of a condition and do not mix the state's channels.

    So two channels that change places change no others. Called with plain values only: a cache of keys and values would
    keep what it is shown.
    """
    plain = (Tensor, int, float, str, torch.dtype, type(None))
    if not _keeps(args, made) or not all(isinstance(x, plain) for x in (*args, *kwargs.values())):
        return False
    large = _large(args[0])
    exchanged = large.clone()
    exchanged[..., :2] = large[..., :2].flip(-1)
    with suppress(Exception):  # whatever it says to such an input
        one, two, other = _tried(module, [large, 2 * large, exchanged], args, kwargs)
        same, change = 1e-3 * one.norm(), one - other
        moved, mixed = change[..., :2].norm(), change[..., 2:].norm()
        return bool((one - two).norm() <= same) and bool(mixed <= same) and bool(moved > mixed)
    return False


def _tried(module: nn.Module, states: list[Tensor], args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """What the module makes of each of these in place of its first argument, with the same random numbers."""
    for x in states:
        with forked_random_numbers([x]):
            yield first_tensor(module.forward(x, *args[1:], **kwargs))


def _keeps(args: tuple, made: Tensor | None) -> bool:
    """Whether numbers came in first, and as many in the same shape came out."""
    if not args or not isinstance(args[0], Tensor) or made is None:
        return False
    return args[0].is_floating_point() and made.shape == args[0].shape


def _large(x: Tensor) -> Tensor:
    """x far above any eps, and far below the largest float16; by a power of two, so that no dtype rounds."""
    size = x.float().square().mean().sqrt().log2().nan_to_num(0, 0, 0).round().item()
    return x * 2.0 ** (6 - size)
