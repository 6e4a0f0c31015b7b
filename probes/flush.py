"""Bring a step's numbers from the device to the host without making training wait.

Everything of one step is packed into one flat tensor and copied once: on CUDA into pinned memory on a side
stream, and the writer thread waits for the copy's event. This file is the only place where probes leave the
device.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor


def start_copy(
    values: Mapping[object, Tensor], dtype: torch.dtype = torch.float32
) -> Callable[[], dict[object, np.ndarray]]:
    """Pack `values` (tensors, as a rule all of one device) and start their copy.

    Returns a function for another thread: it waits for the copy and gives the values back as arrays of that
    type in their shapes.
    """
    groups: dict[torch.device, dict[object, Tensor]] = {}
    for key, value in values.items():
        groups.setdefault(value.device, {})[key] = value
    packs = [(_shapes(group), _copy_to_host(_pack(group, dtype))) for group in groups.values()]

    def fetch() -> dict[object, np.ndarray]:
        out = {}
        for shapes, wait in packs:
            host, start = wait(), 0
            for key, shape in shapes.items():
                size = math.prod(shape)
                out[key] = host[start : start + size].reshape(shape)
                start += size
        return out

    return fetch


def _shapes(group: Mapping[object, Tensor]) -> dict[object, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in group.items()}


def _pack(group: Mapping[object, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([value.detach().reshape(-1).to(dtype) for value in group.values()])


def _copy_to_host(flat: Tensor) -> Callable[[], np.ndarray]:
    if flat.device.type != "cuda":
        # On the CPU `flat` is already a copy of its own; elsewhere the copy is left to the thread.
        return lambda: flat.cpu().numpy()
    side = _side_stream(flat.device)
    side.wait_stream(torch.cuda.current_stream(flat.device))
    with torch.cuda.stream(side):
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        pinned.copy_(flat, non_blocking=True)
        flat.record_stream(side)
        done = torch.cuda.Event(blocking=True)
        done.record(side)

    def wait() -> np.ndarray:
        done.synchronize()
        return pinned.numpy().copy()

    return wait


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
