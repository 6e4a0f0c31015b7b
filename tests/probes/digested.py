"""Runs of a few hundred made-up rows, in one attempt or several, with digests."""

from pathlib import Path

import numpy as np

from benchmarks import long_run
from probes import compacting
from probes import manifest as files
from probes.attempts import row_shape
from probes.digest import FOLDER
from probes.jsonfile import write_json
from probes.manifest import Manifest
from probes.run import Run
from probes.shard import shard_name, write_shard

LAYOUT = long_run.layout(4)
NAMES = ("hidden_rms", "output_rms", "depth_weight", "mixing_weight", "loss")


def begin(path: Path, step: int = 0, number: int = 0, created: float = 1000.0) -> Path:
    """An attempt's folder, with its manifest and an end."""
    folder = path / f"attempt-{number:05d}" if number else path
    (folder / files.RANK_FOLDER).mkdir(parents=True)
    manifest = Manifest(LAYOUT, created + number, 1, 3, step=step)
    write_json(folder / (files.ATTEMPT if number else files.MANIFEST), manifest.to_json())
    write_json(folder / files.END, {"time": 2000.0, "status": "finished", "reason": "", "step": 0})
    return folder / files.RANK_FOLDER


def seal(
    folder: Path, steps, number: int, attempt: int = 0, seed: int = 0, blanks: bool = True, rank: int = 0
) -> Path:
    """A shard of these steps: vectors at each, matrices at every third, the loss twice a step."""
    random = np.random.default_rng([seed, number, attempt, rank])
    steps, tensors = np.array(steps, np.int64), {}
    for name in NAMES:
        when = steps[steps % 3 == 0] if "weight" in name else np.repeat(steps, 2 if name == "loss" else 1)
        if not len(when):
            continue
        values = random.normal(0, 1, (len(when), *row_shape(name, LAYOUT))).astype(np.float32)
        if blanks:
            values[random.random(values.shape) < 0.05] = np.nan
            values[random.random(values.shape) < 0.02] = np.inf
        tensors |= {name: values, f"{name}.step": when}
    about = {"rank": str(rank), "attempt": str(attempt), "shard": str(number), "format": "2"}
    path = folder / shard_name(int(steps[0]), int(steps[-1]))
    write_shard(path, tensors, about, durable=False)
    return path


def two_attempts(path: Path, shards: tuple[int, int] = (9, 4), step: int = 200) -> Path:
    """Two attempts, so many shards of 30 steps in the first, and of 25 in the second, which began at `step`."""
    first = begin(path)
    for number in range(shards[0]):
        seal(first, range(30 * number, 30 * number + 30), number)
    second = begin(path, step, 1)
    for number in range(shards[1]):
        seal(second, range(step + 25 * number, step + 25 + 25 * number), number, 1)
    return path


def compacted(path: Path, whole: bool = True) -> int:
    """Make the digests of a run; how many files."""
    run = Run(path)
    made = [
        list(compacting.compact(attempt, run.layout, attempt.shards / FOLDER, whole))
        for attempt in run.attempts
    ]
    return sum(map(len, made))


def values(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (run.steps(name), run[name]) for name in run.metrics}


def same(found: Run, wanted: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    assert found.metrics == sorted(wanted)
    for name, (steps, numbers) in wanted.items():
        np.testing.assert_array_equal(found.steps(name), steps)
        np.testing.assert_array_equal(found[name], numbers)
