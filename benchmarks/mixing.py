"""How long the writer's thread works on the sample of one step, by depth and width: `python -m benchmarks.mixing`."""

import time

import numpy as np
import torch

from probes.mixing import recover
from probes.sample import ELEMENTS, TOKENS, Sample
from probes.sampled import outliers

EPS = float(torch.finfo(torch.float32).eps)


def working(layers: int, width: int) -> float:
    """Seconds of one thread for a plain residual, the least of three."""
    rows, tokens = layers + 1, min(TOKENS, ELEMENTS // width)
    outputs = np.random.default_rng(0).standard_normal((rows, tokens, width), dtype=np.float32)
    states, given, eps = outputs.cumsum(0), np.arange(1, rows + 1), np.full(rows, EPS)
    times = []
    for _ in range(3):
        started = time.thread_time()
        recover(states, outputs, given, eps)
        outliers(states, outputs)
        times.append(time.thread_time() - started)
    return min(times)


def main() -> None:
    for layers in (24, 96, 192):
        held = sum(tensor.nbytes for tensor in Sample(layers + 1, torch.device("cpu")).tensors())
        times = ", ".join(f"{1e3 * working(layers, width):.0f} ms at {width}" for width in (512, 1024, 2048))
        print(f"{layers} layers: {times}; {held / 2**20:.1f} MiB held")


if __name__ == "__main__":
    main()
