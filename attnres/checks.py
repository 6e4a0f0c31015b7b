"""What cannot be, said in one sentence that names the argument and says what it must be; all raise ValueError."""

import math
from collections.abc import Sequence
from types import UnionType
from typing import get_args

import torch
from torch import Tensor


def check_count(name: str, value: object, optional: bool = False) -> None:
    """A whole number of at least 1."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")


def check_above(name: str, value: object) -> None:
    """A finite number above 0."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, not {value!r}.")


def check_not_negative(name: str, value: object) -> None:
    """A finite number of at least 0."""
    if not _is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_is(name: str, value: object, kind: type | UnionType) -> None:
    """An instance of this class, or of one of these."""
    if not isinstance(value, kind):
        kinds = " or a ".join(each.__name__ for each in get_args(kind) or (kind,))
        raise ValueError(f"{name} must be a {kinds}, not {described(value)}.")


def check_tokens(tokens: object) -> None:
    """Whole numbers, [B, T]."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be an integer tensor [B, T], rows of token numbers, not {described(tokens)}."
        )


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """Numbers below the vocabulary; reads them back from their device."""
    low, high = (x.item() for x in tokens.aminmax()) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"tokens must be from 0 to {vocabulary - 1}, below the model's vocabulary, and there are {low} and {high}."
        )


def check_sources(name: str, sources: Sequence[Tensor], width: int | None = None) -> None:
    """At least one tensor [B, T, D] of floating-point numbers, all of one shape and on one device."""
    if not isinstance(sources, list | tuple | Tensor):
        raise ValueError(f"{name} must be a list of tensors [B, T, D], not {described(sources)}.")
    if len(sources) == 0:
        raise ValueError(f"{name} must hold at least the embedding, the first source of every read.")
    for source in sources:
        if not isinstance(source, Tensor) or source.ndim != 3 or not source.is_floating_point():
            raise ValueError(f"{name} must be floating-point tensors [B, T, D], not {described(source)}.")
    first = sources[0]
    for source in sources:
        if source.shape != first.shape or source.device != first.device:
            raise ValueError(
                f"{name} must have one shape [B, T, D] and be on one device, and these are {described(first)} and "
                f"{described(source)}."
            )
    if width is not None and first.shape[-1] != width:
        raise ValueError(f"{name} must have the width {width} of the read, not {first.shape[-1]}.")


def check_called(**parts: object) -> None:
    """Modules, or other things to be called."""
    for name, part in parts.items():
        if not callable(part):
            raise ValueError(f"{name} must be a module, not {described(part)}.")


def check_output(layer: int, layers: int | None, output: object, source: Tensor) -> None:
    """The output [B, T, D] of layer 1, 2, ... of so many, like the sources before it."""
    if layers is not None and layer > layers:
        raise ValueError(f"layers is {layers}, and layer {layer} writes: build the residual with that many.")
    if not isinstance(output, Tensor) or output.shape != source.shape or not output.is_floating_point():
        raise ValueError(
            f"Layer {layer} must give an output like its sources, {described(source)}, and gave {described(output)}."
        )


def described(value: object) -> str:
    """A tensor by its shape, dtype and device, anything else by its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"a {type(value).__name__}" if value is not None else "None"
