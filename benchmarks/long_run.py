"""A long run, made up: every vector of a deep model at every recorded step, matrices at every hundredth.

Written in the format of a real recording with `probes.shard`, without waiting for the disk. The numbers are noise round
smooth curves; one value of one step is a spike, which every picture of the run must show.
"""

import time
from pathlib import Path

import numpy as np

from probes.attempts import row_shape
from probes.jsonfile import write_json
from probes.layout import Layer, Layout
from probes.manifest import END, MANIFEST, RANK_FOLDER, Manifest
from probes.shard import shard_name, write_shard
from probes.vocabulary import FORMAT_VERSION

VECTORS = (
    "hidden_rms",
    "output_rms",
    "block_rms",
    "output_grad_rms",
    "hidden_grad_rms",
    "block_grad_rms",
    "param_grad_norm",
)
SCALARS = ("loss", "lr", "grad_norm", "step_time", "wall_time", "tokens")
MATRICES = (
    "depth_weight",
    "depth_weight_std",
    "contribution_rms",
    "depth_entropy",
    "param_norm",
    "nonfinite",
)
SPIKED, SPIKE_LAYER, SPIKE = "hidden_rms", 41, 1000.0


def layout(layers: int) -> Layout:
    names = ("attention", "mlp")
    return Layout.build(
        [Layer(i + 1, names[i % 2], i // 2 + 1, f"blocks.{i // 2}.{names[i % 2]}") for i in range(layers)]
    )


def spike_step(steps: int) -> int:
    """The step of the spike: no round number."""
    return int(steps * 0.6180339)


def make(path: Path, steps: int, layers: int, *, matrices_every: int = 100, rows: int = 100) -> int:
    """A finished run of so many recorded steps at `path`, `rows` of them in a shard. Returns the bytes of its shards."""
    shape = layout(layers)
    config = {"residual": "full", "blocks": layers // 2, "width": 4 * layers, "synthetic": True}
    folder = path / RANK_FOLDER
    folder.mkdir(parents=True)
    write_json(path / MANIFEST, Manifest(shape, time.time(), 1, matrices_every, config).to_json())
    random = np.random.default_rng(0)
    # Noise is drawn once and read from different places: what is measured is reading, not chance.
    widest = max(int(np.prod(row_shape(name, shape))) for name in (*VECTORS, *MATRICES))
    noise = random.normal(1, 0.05, 4 * max(widest, rows * (layers + 1))).astype(np.float32)
    spike, size, shards = spike_step(steps), 0, 0
    for first in range(0, steps, rows):
        at = np.arange(first, min(first + rows, steps))
        tensors = {}
        for name in (*SCALARS, *VECTORS, *MATRICES):
            when = at[at % matrices_every == 0] if name in MATRICES else at
            if not len(when):
                continue
            tensors[name] = _values(name, when, shape, noise, random)
            tensors[f"{name}.step"] = when.astype(np.int64)
        if first <= spike < first + rows:
            tensors[SPIKED][spike - first, min(SPIKE_LAYER, layers)] = SPIKE
        about = {"rank": "0", "attempt": "0", "shard": str(shards), "format": str(FORMAT_VERSION)}
        target = folder / shard_name(int(at[0]), int(at[-1]))
        size += write_shard(target, tensors, about, durable=False)
        shards += 1
    end = {"time": time.time(), "status": "finished", "reason": "", "step": steps - 1}
    write_json(path / END, {**end, "dropped": 0, "shards": shards, "gaps": []})
    return size


def _values(name: str, steps: np.ndarray, shape: Layout, noise: np.ndarray, random) -> np.ndarray:
    width = row_shape(name, shape)
    count = len(steps) * int(np.prod(width))
    start = int(random.integers(0, len(noise) - count)) if len(noise) > count else 0
    jitter = np.resize(noise[start : start + count], count).reshape(len(steps), *width)
    if name in ("wall_time", "tokens"):
        return (steps * {"wall_time": 0.1, "tokens": 4096.0}[name]).astype(np.float32)
    if name == "nonfinite":
        return np.zeros_like(jitter)
    course = 1 + 3 * np.exp(-steps / 2e4)
    if not width:
        return (jitter * course).astype(np.float32)
    depth = np.linspace(1, 2, width[0])
    return (jitter * course[:, None] * depth).astype(np.float32)
