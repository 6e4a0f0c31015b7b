"""Made runs: small, deterministic, plausible, written with the real writer. Not measurements."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes import open_run
from probes.attributed import About, Attribution, Curve, attribution_path, write_attribution
from probes.layout import Layer, Layout
from probes.manifest import RANK_FOLDER, Manifest
from probes.tokens import write_tokens
from probes.writer import RunWriter


def layout(variant: str, blocks: int, per_depth_block: int = 6) -> Layout:
    layers = [
        Layer(i + 1, ("attention", "mlp")[i % 2], i // 2 + 1, f"blocks.{i // 2}.{('attn', 'mlp')[i % 2]}")
        for i in range(2 * blocks)
    ]
    if variant != "block":
        return Layout.build(layers)
    reads = range(len(layers) + 1)
    return Layout.build(layers, [1 if done == 0 else 1 + -(-done // per_depth_block) for done in reads])


def manifest(variant: str, blocks: int = 6, every: int = 10, created: float = 0.0, **config) -> Manifest:
    told = {"residual": variant, "blocks": blocks, "width": 128, "lr": 3e-3, "seed": 0}
    if variant == "block":
        told["layers_per_block"] = 6
    return Manifest(layout(variant, blocks), created or time.time(), every, every, {**told, **config})


def rows(variant: str, shape: Layout, step: int, without: tuple[str, ...] = (), matrices: bool = True):
    """(metric, step, value) of one step: what a recorder would hand to the writer."""
    count = len(shape.layers)
    noise = np.random.default_rng(step + len(variant)).normal(0, 1, 4 * count + 8)
    learned = 1 - np.exp(-step / 400)
    depth = np.arange(count + 1) / count
    output = 0.3 + learned * (0.3 + (3 * depth**2 if variant == "prenorm" else 0.5 * depth))
    output *= 1 + 0.03 * noise[: count + 1]
    if variant == "prenorm":
        hidden = np.sqrt(np.cumsum(output**2) * (1 + 2 * learned * depth))
        grad = 1e-3 * np.exp(-3.2 * learned * depth) * (1 + 0.05 * noise[: count + 1])
    else:
        hidden = 0.5 + 0.5 * learned * np.abs(np.sin(9 * depth + 1)) + 0.4 * depth
        grad = 4e-4 * np.exp(-1.2 * learned * depth) * (1 + 0.15 * noise[: count + 1])
    gap = {"prenorm": 0.0, "full": 0.06, "block": 0.05}.get(variant, 0.0) * learned
    values = {
        "hidden_rms": hidden,
        "output_rms": output,
        "block_rms": hidden[1::2][: shape.blocks],
        "output_grad_rms": grad,
        "hidden_grad_rms": grad * np.linspace(9, 1, count + 1),
        "param_grad_norm": 20 * grad[1:],
        "loss": 2.4 + 3.2 * np.exp(-step / 300) - gap + 0.04 * noise[-1],
        "grad_norm": 1 + 0.2 * noise[-2],
        "lr": 3e-3 * min(1, step / 100),
    }
    if variant != "prenorm" and matrices:
        weight, spread, entropy = triangle(shape, learned)
        values |= {
            "depth_weight": weight,
            "depth_weight_std": spread,
            "contribution_rms": weight * np.resize(output, len(shape.sources)),
            "depth_entropy": entropy,
        }
    for name, value in values.items():
        if name not in without:
            value = shape.pack(value) if np.ndim(value) == 2 else np.asarray(value, np.float32)
            yield name, step, value


def triangle(shape: Layout, learned: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [R, S], their spread, entropy [R]: from even to local, with a few skips."""
    reads, sources = len(shape.reads), len(shape.sources)
    logits = np.zeros((reads, sources))
    for row, read in enumerate(shape.reads):
        last = read.sources - 1
        logits[row] = -0.35 * (last - np.arange(sources))
        logits[row, 0] += 1.5 if read.kind == "attention" else 0.7
        logits[row, last] += 1.2 if read.kind == "mlp" else 0.0
        if last > 5:
            logits[row, (row * 7) % (last - 1)] += 2.2
    weight = np.exp(2 * learned * logits) * shape.triangle()
    weight /= weight.sum(axis=1, keepdims=True)
    counts = shape.triangle().sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        plogp = np.where(weight > 0, weight * np.log(weight), 0).sum(axis=1)
        entropy = np.where(counts > 1, -plogp / np.log(counts), np.nan)
    return weight, 0.3 * weight * (1 - weight), entropy


def run(
    path: Path,
    variant: str = "full",
    blocks: int = 6,
    steps: int = 21,
    every: int = 10,
    created: float = 0.0,
    status: str = "finished",
    reason: str = "",
    without: tuple[str, ...] = (),
    matrices_every: int = 1,
    **config,
) -> Path:
    """A closed run of `steps` recorded steps."""
    told = manifest(variant, blocks, every, created, **config)
    writer = RunWriter(path, told)
    for i in range(steps):
        made = list(rows(variant, told.layout, i * every, without, i % matrices_every == 0))
        writer.put(lambda made=made: made, i * every)
        if writer._queue.qsize() > 200:
            time.sleep(0.05)
    writer.close(status, reason)
    return path


def follow(path: Path, steps: Sequence[int], tokens: int = 128) -> None:
    """Snapshots of two sequences of single letters in the run at `path`, each token a little different from the others."""
    shape = open_run(path).layout
    texts = [[chr(97 + (7 * token) % 26) for token in range(tokens)]] * 2
    for step in steps:
        weight = triangle(shape, 1 - np.exp(-step / 400))[0]
        turned = 0.3 * np.random.default_rng(step).random((2, tokens, 1, 1)) * shape.triangle()
        weight = weight + turned * weight.max()
        weight /= weight.sum(axis=-1, keepdims=True)
        write_tokens(path / RANK_FOLDER, step, shape.pack(weight), np.zeros((2, tokens), np.int64), texts)


def attribution(
    path: Path, step: int = 200, with_edges: bool = True, digest: str = "0123456789ab", **about
) -> Attribution:
    """Written into a made run: in every read the newest source has the largest effect, and the embedding, however heavy, has
    none; of the layers the third is ballast."""
    run = open_run(path)
    layout = run.layout
    count = len(layout.layers)
    weight = triangle(layout, 1 - np.exp(-step / 400))[0]
    value = np.full(layout.triangle().shape, np.nan)
    for row, read in enumerate(layout.reads):
        value[row, : read.sources] = 0.02 * np.arange(read.sources) / max(1, read.sources - 1)
    removal = np.linspace(0.5, 0.05, count)
    removal[2] = -0.001
    curve = Curve(
        np.arange(count + 1),
        {
            "attribution": 3 + np.linspace(0, 1, count + 1) ** 3,
            "share": 3 + np.linspace(0, 1, count + 1),
            "random": 3 + np.linspace([0.0] * 3, [1.0] * 3, count + 1).T ** 0.5,
        },
    )
    edges = (
        {"edges": {"ablation": value, "gradient": 0.9 * value}, "weight": weight, "share": weight}
        if with_edges
        else {}
    )
    found = Attribution(
        layout,
        About(
            value=3.0,
            sequences=16,
            tokens=128,
            data="text.txt",
            checkpoint="x.pt",
            **{"created": step + 1.0, **about},
        ),
        layers={"removal": removal * step / 200, "gradient": removal},
        layers_std={"removal": np.full(count, 0.004)},
        final_share=np.linspace(0.02, 0.2, count + 1) if with_edges else None,
        curves={"layers": curve},
        edges_std={"ablation": np.full(value.shape, 0.002)} if with_edges else {},
        step=step,
        **edges,
    )
    write_attribution(attribution_path(path, step, digest), found)
    return open_run(path).attributions()[-1]
