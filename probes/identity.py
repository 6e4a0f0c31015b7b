"""Does the stream add up? Every state of a plain residual is the embedding plus the outputs before it.

Checked on the first tokens and channels of a forward, wherever matrices are recorded, so that it costs nothing to speak
of and asks nothing of the host.
"""

import numpy as np
import torch
from torch import Tensor

_TOKENS, _CHANNELS = 8, 256
TOLERANCE = 1e-3


class Sample:
    """The same few elements of every state and output of one forward. `given[l]` is the number of sources that the
    state of layer l+1 sums; the final state sums all."""

    def __init__(self, given: list[int], device: torch.device):
        rows = len(given) + 1
        self.state = torch.full((rows, _TOKENS * _CHANNELS), torch.nan, device=device)
        self.output = torch.full_like(self.state, torch.nan)
        self._given = torch.tensor([*given, rows], device=device)

    def reset(self) -> None:
        """Forget the forward before: a layer that this one leaves out would otherwise be compared with that."""
        for rows in (self.state, self.output):
            rows.fill_(torch.nan)

    def tensors(self) -> list[Tensor]:
        return [self.state, self.output, self._given]

    def of(self, place: str) -> Tensor:
        """Where the sample of a "state" or an "output" goes."""
        return self.state if place == "state" else self.output

    def finish(self) -> Tensor:
        """identity_error [L+1]: how far each state is from the sum of its sources, relative to the state."""
        state, output = self.state.nan_to_num(), self.output.nan_to_num()
        sums = output.cumsum(0)[self._given - 1]
        error = (state - sums).norm(dim=1) / state.norm(dim=1)
        # A source that was not seen leaves the states that sum it without an answer.
        unseen = self.output[:, 0].isnan().cumsum(0)[self._given - 1] > 0
        return error.masked_fill(unseen | self.state[:, 0].isnan(), torch.nan)


def keep_sample(x: Tensor, rows: Tensor, row: int) -> None:
    """Copy the first tokens and channels of `x` [..., D] to `rows[row]`."""
    few = x.reshape(-1, x.shape[-1])[:_TOKENS, :_CHANNELS].reshape(-1)
    rows[row, : few.shape[0]].copy_(few)


def first_broken(errors: np.ndarray, dtype: torch.dtype) -> int | None:
    """Index of the first state that is not the sum of its sources; None where all are, as far as was seen."""
    broken = np.flatnonzero(errors > tolerance(dtype))
    return int(broken[0]) if broken.size else None


def tolerance(dtype: torch.dtype) -> float:
    """What rounding alone may do: bfloat16 is off by up to 2**-8 at every sum."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps)
