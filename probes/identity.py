"""Does the stream add up? Every state of a plain residual is the embedding plus the outputs before it.

Checked on a sample of tokens wherever matrices are recorded.
"""

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-3
_ROUNDINGS = 4  # units in the last place


def identity_error(states: Tensor, outputs: Tensor, given: Tensor) -> Tensor:
    """How far each of `states` [L+1, n] is from the sum of its first `given` of `outputs` [L+1, n], relative to the state,
    [L+1] on the device.

    NaN for a state that was not seen, or one of whose sources was not.
    """
    known = states.nan_to_num()
    sums = outputs.nan_to_num().cumsum(0)[given - 1]
    error = (known - sums).norm(dim=1) / known.norm(dim=1)
    unseen = outputs[:, 0].isnan().cumsum(0)[given - 1] > 0
    return error.masked_fill(unseen | states[:, 0].isnan(), torch.nan)


def first_broken(errors: np.ndarray, allowed: float) -> int | None:
    """Index of the first state that is not the sum of its sources; None where all are, as far as was seen."""
    broken = np.flatnonzero(errors > allowed)
    return int(broken[0]) if broken.size else None


def tolerance(dtype: torch.dtype) -> float:
    """What rounding alone may do: bfloat16 is off by up to 2**-8 at every sum."""
    return max(TOLERANCE, _ROUNDINGS * torch.finfo(dtype).eps)


def tolerance_of(about: Tensor) -> Tensor:
    """The same for a sample, [] on the device, from what it says `about` itself: the parameters of a model that rounds what it
    makes (FSDP2's mixed precision) are of a finer type."""
    return (_ROUNDINGS * about[..., 2].max()).clamp_min(TOLERANCE)
