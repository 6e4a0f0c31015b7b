"""How long the writer's thread works on the sample of one step, by depth and width: `python -m benchmarks.mixing`."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import provenance
from probes.mixing import recover
from probes.provenance import processor
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixing", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--smoke", action="store_true", help="four layers")
    options = parser.parse_args(arguments)
    depths, widths = ((4,), (64, 128)) if options.smoke else ((24, 96, 192), (512, 1024, 2048))
    lines = [
        "# What recovered mixing costs",
        "",
        f"`{provenance.command('mixing', arguments)}` at {provenance.commit()}, on {processor()}; numpy {np.__version__}. "
        "Milliseconds of one thread, the least of three.",
        "",
        "| layers | " + " | ".join(f"width {width}" for width in widths) + " | held on the device |",
        "|---" * (len(widths) + 2) + "|",
    ]
    for layers in depths:
        held = sum(tensor.nbytes for tensor in Sample(layers + 1, torch.device("cpu")).tensors())
        times = " | ".join(f"{1e3 * working(layers, width):.0f} ms" for width in widths)
        lines.append(f"| {layers} | {times} | {held / 2**20:.1f} MiB |")
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
