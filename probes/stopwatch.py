"""Time steps that follow each other as in training: nothing waits for the device between them."""

import itertools
import time
from collections.abc import Callable, Iterable

import torch


def timed(steps: Iterable[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each step, from the end of the one before it to its own end.

    On CUDA the ends are events in the stream, so that a step is charged what it takes from the device's time;
    elsewhere the host's clock is read when the device is done.
    """
    stamps = [_stamp(device)]
    for step in steps:
        step()
        stamps.append(_stamp(device))
    if device.type != "cuda":
        return [end - start for start, end in itertools.pairwise(stamps)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(stamps)]


def _stamp(device: torch.device) -> "float | torch.cuda.Event":
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
