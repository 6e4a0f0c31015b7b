"""Which tokens count: the mask that a model is called with, and where it fits."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.manifest import RunError

# What Hugging Face models call their padding mask: 1 for a token, 0 for padding.
_USUAL = "attention_mask"

MaskOf = Callable[[tuple, dict], object]


def mask_finder(mask: str | MaskOf | None, root: nn.Module) -> MaskOf:
    """A function from the arguments of `root`'s forward, (args, kwargs), to its mask [B, T] or None.

    `mask` is the name of an argument or such a function; by default the argument `attention_mask`. Where the call gives
    none, a function that was made from a name returns its third argument, `missing`.
    Raises RunError where the forward has no argument of that name.
    """
    if callable(mask):
        return mask
    if mask is not None and not isinstance(mask, str):
        raise RunError(
            "mask must be the name of an argument of the model's forward, or a function of (args, kwargs) "
            f"that gives the mask [B, T]; it is {mask!r}."
        )
    name = mask or _USUAL
    parameters = inspect.signature(root.forward).parameters
    # Its place among the positional arguments; a catch-all **kwargs may take any name.
    positions = [
        key for key, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if (
        mask is not None
        and name not in parameters
        and not any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    ):
        raise RunError(
            f"The forward of {type(root).__name__} has no argument {name!r} for the mask: it takes "
            f"{', '.join(parameters) or 'nothing'}."
        )
    position = positions.index(name) if name in positions else None

    def find(args: tuple, kwargs: dict, missing: object = None):
        if position is not None and position < len(args):
            return args[position]
        return kwargs.get(name, missing)

    return find


def fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """`mask` [B, T] as bool, for an `x` [B, T, ...] or, of flattened tokens, [B*T, D]; None where it does not fit."""
    if mask is None:
        return None
    if x.ndim > 2 and x.shape[:2] == mask.shape:
        return mask if mask.dtype == torch.bool else mask != 0
    if x.ndim == 2 and x.shape[0] == mask.numel():
        return fitting(mask, x.unflatten(0, mask.shape)).flatten()
    return None
