"""Sums and samples of several processes, as they travel."""

import numpy as np
import pytest
import torch

from probes.packing import packed, together, unpack


@pytest.mark.parametrize("tokens", [(4, 4), (0, 4), (4, 0), (0, 0), (3, 1)])
def test_samples_come_together(tokens):
    """Those of several processes, one after the other, and nothing of one that has no tokens."""
    rows, elements, width = 3, 8, 2
    kept = []
    for rank, count in enumerate(tokens):
        state = np.full((rows, elements), np.nan, np.float32)
        state[:, : count * width] = 10 * rank + np.arange(count * width)
        about = np.zeros((2, rows, 3), np.float32)
        about[:] = (count, width, 1e-7) if count else 0
        kept.append(np.concatenate([state.ravel(), state.ravel() + 100, about.ravel()]))
    states, outputs, about = together(np.stack(kept), rows, elements)
    expected = [10 * rank + i for rank, count in enumerate(tokens) for i in range(count * width)]
    assert states[0].tolist() == expected or (not expected and np.isnan(states).all())
    np.testing.assert_array_equal(outputs, states + 100)
    assert about[:, :, 0].tolist() == [[sum(tokens)] * rows] * 2


def test_packing_gives_back_what_was_packed():
    tensors = [
        torch.tensor([1.5, 2.5]),
        torch.tensor(2**40 + 1),
        torch.tensor([[1 / 3]], dtype=torch.float64),
    ]
    into = [torch.zeros_like(tensor) for tensor in tensors]
    unpack(packed(tensors).numpy(), into)
    assert all(torch.equal(*pair) for pair in zip(tensors, into, strict=True))
    with pytest.raises(ValueError, match="4 numbers for 2 places"):
        unpack(packed(tensors).numpy(), into[:1])
