"""A sample of tokens: every state and output of one forward at the same tokens, kept on the device.

What it is for: whether the stream adds up (identity.py), and what each state is made of (mixing.py). It is taken
wherever matrices are recorded, asks nothing of the host, and holds equally many elements whatever the width.
"""

import torch
from torch import Tensor

from probes.parallel import local

ELEMENTS = 2**15
"""Of each state and output. More channels mean fewer tokens."""
TOKENS = 512


class Sample:
    """Rows are states and outputs as the metrics have them, [L+1, ELEMENTS] float32: tokens one after the other, then
    NaN. `about` [2, L+1, 3] says of each state and each output how many tokens, how many channels, and the machine epsilon
    of its type. With a `share` of k there is room for a k-th of it: k processes fill one sample."""

    def __init__(self, rows: int, device: torch.device, share: int = 1):
        self.elements, self._tokens = ELEMENTS // share, TOKENS // share
        self.state = torch.full((rows, self.elements), torch.nan, device=device)
        self.output = torch.full_like(self.state, torch.nan)
        self.about = torch.zeros(2, rows, 3, device=device)

    def reset(self) -> None:
        """Forget the forward before: a layer that this one leaves out would otherwise be compared with that."""
        for rows in (self.state, self.output):
            rows.fill_(torch.nan)
        self.about.zero_()

    def tensors(self) -> list[Tensor]:
        return [self.state, self.output, self.about]

    def keep(self, x: Tensor, place: str, row: int, mask: Tensor | None = None) -> None:
        """Take row `row` of a "state" or an "output" from `x` [..., D]: of the tokens that a `mask` (bool) lets count,
        as many as there is room for, evenly spaced."""
        x = local(x)
        width = x.shape[-1]
        x = x.reshape(-1, width)
        count = min(x.shape[0], self._tokens, max(1, self.elements // width))
        few = _spread(x, count, mask)[:, : self.elements].reshape(-1)
        rows, about = (self.state, self.about[0]) if place == "state" else (self.output, self.about[1])
        rows[row, : few.shape[0]].copy_(few)
        tokens, channels, eps = about[row]
        tokens.fill_(count)
        channels.fill_(min(width, self.elements))
        eps.fill_(torch.finfo(x.dtype).eps)


def _spread(x: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """`count` rows of `x` [N, D], evenly spaced; where a mask leaves fewer, NaN after those."""
    steps = torch.arange(count, device=x.device)
    if mask is None or mask.numel() != x.shape[0]:
        return x if count == x.shape[0] else x[steps * x.shape[0] // count]
    so_far = mask.reshape(-1).cumsum(0)
    total = so_far[-1:]
    nth = steps * total.clamp_min(count) // count
    place = torch.searchsorted(so_far, nth + 1).clamp_max(x.shape[0] - 1)
    return x[place].masked_fill((nth >= total)[:, None], torch.nan)
