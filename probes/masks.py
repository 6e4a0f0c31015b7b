"""Which tokens count: the mask that a model is called with, and where it fits."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.manifest import RunError
from probes.parallel import local, part_of
from probes.sites import Sites

# What Hugging Face models call their padding mask: 1 for a token, 0 for padding.
_USUAL = "attention_mask"

MaskOf = Callable[[tuple, dict], object]


class Masks:
    """Where the mask of a forward is found: in the arguments of the model, or of a module `inside` it that is given
    one of its own.

    `mask` is the name of an argument of the model's forward, or a function of its (args, kwargs); by default the
    argument `attention_mask`. Raises RunError where the forward has no argument of that name.
    """

    def __init__(self, mask: str | MaskOf | None, sites: Sites):
        self.odd = False  # a mask was there, but not one of [B, T]
        self._of_model = mask if callable(mask) else _finder(mask, sites.called)
        self.inside = [(holder, _finder(None, holder)) for holder in sites.holders] if mask is None else []

    def of_model(self, args: tuple, kwargs: dict) -> Tensor | None:
        """[B, T], zero where a token does not count; None: all count."""
        mask = self._of_model(args, kwargs)
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            return mask
        self.odd = True
        return None


def _finder(mask: str | None, module: nn.Module) -> MaskOf:
    """A function that takes an argument by name out of (args, kwargs). Where the call gives none it returns its third
    argument, `missing`."""
    if mask is not None and not isinstance(mask, str):
        raise RunError(
            "mask must be the name of an argument of the model's forward, or a function of (args, kwargs) "
            f"that gives the mask [B, T]; it is {mask!r}."
        )
    name = mask or _USUAL
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if mask is not None and name not in parameters and not takes_any:
        raise RunError(
            f"The forward of {type(module).__name__} has no argument {name!r} for the mask: it takes "
            f"{', '.join(parameters) or 'nothing'}."
        )
    positions = [
        key for key, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    position = positions.index(name) if name in positions else None

    def find(args: tuple, kwargs: dict, missing: object = None):
        if position is not None and position < len(args):
            return args[position]
        return kwargs.get(name, missing)

    return find


def fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """`mask` [B, T] as bool, for an `x` [B, T, ...], with tokens first [T, B, ...] or, of flattened tokens, [B*T, D]; None
    where it does not fit."""
    if mask is None:
        return None
    mask = part_of(mask, x)
    x = local(x)
    if x.ndim > 2 and x.shape[:2] == mask.shape:
        return mask if mask.dtype == torch.bool else mask != 0
    if x.ndim > 2 and x.shape[:2] == mask.shape[::-1]:
        return fitting(mask.T, x)
    if x.ndim == 2 and x.shape[0] == mask.numel():
        return fitting(mask, x.unflatten(0, mask.shape)).flatten()
    return None


def where_known(mask: Tensor | None, known: Tensor | None, x: Tensor) -> Tensor | None:
    """The tokens of `x` in `mask` (None: all), where `known` (bool [], None: true) says that they are any."""
    if known is None:
        return mask
    return known.expand(local(x).shape[:-1]) if mask is None else mask & known
