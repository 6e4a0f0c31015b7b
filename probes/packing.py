"""Sums of several shapes as one flat tensor, and samples of several processes as one."""

import numpy as np
import torch
from torch import Tensor


def packed(tensors: list[Tensor]) -> Tensor:
    """One flat tensor of all, float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def unpack(flat: np.ndarray, into: list[Tensor]) -> None:
    """Write what `packed` made of such tensors into these, on the host."""
    sizes = [tensor.numel() for tensor in into]
    if sum(sizes) != len(flat):
        raise ValueError(f"{len(flat)} numbers for {sum(sizes)} places")
    for tensor, part in zip(into, torch.from_numpy(np.array(flat)).split(sizes), strict=True):
        tensor.copy_((part if tensor.is_floating_point() else part.round()).reshape(tensor.shape))


def together(samples: np.ndarray, rows: int, elements: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sample of those of several processes: states and outputs [rows, n], tokens one after the other, and about
    [2, rows, 3] (sample.py). `samples` [senders, k] are each one's states, outputs and about, flat."""
    cut = np.split(samples, [rows * elements, 2 * rows * elements], axis=1)
    states, outputs = (each.reshape(len(samples), rows, elements) for each in cut[:2])
    abouts = cut[2].reshape(len(samples), 2, rows, 3)
    widths = abouts[:, :, :, 1]
    width = int(widths.max())
    tokens = abouts[:, :, :, 0].max((1, 2)).astype(int)
    used = [min(int(count) * width, elements) for count in tokens]
    about = abouts.max(0)
    about[:, :, 0] = abouts[:, :, :, 0].sum(0)
    states, outputs = (
        np.concatenate([each[i, :, :n] for i, n in enumerate(used)], axis=1) for each in (states, outputs)
    )
    if not states.size:
        states = outputs = np.full((rows, 1), np.nan, np.float32)
    return states, outputs, about
