"""The same numbers written and read by depthscope, TensorBoard and trackio: `rounds` of `tags` values a recorded step.

Each is a function of a folder and the values [steps, tags] that gives seconds to write and to read all of them back as
arrays, and bytes on disk. trackio runs in an interpreter of its own, that has it.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import long_run
from probes.manifest import Manifest
from probes.run import Run
from probes.writer import RunWriter

Took = dict[str, float]  # write and read in seconds, bytes


def depthscope(folder: Path, values: np.ndarray) -> Took:
    """As the recorder does it: one row a step, sealed by the writer's thread."""
    start = time.perf_counter()
    writer = RunWriter(folder / "run", Manifest(long_run.layout(values.shape[1] - 1), time.time(), 1, 1))
    for step, row in enumerate(values):
        while not writer.put(lambda step=step, row=row: [("hidden_rms", step, row)], step):
            time.sleep(0.001)  # a script that does nothing but log is faster than its queue
        while writer._queue.qsize() > 200:
            time.sleep(0.001)
    writer.close("finished")
    written = time.perf_counter() - start
    start = time.perf_counter()
    found = Run(folder / "run")["hidden_rms"]
    read = time.perf_counter() - start
    assert np.array_equal(found, values)
    return {"write": written, "read": read, "bytes": size(folder)}


def tensorboard(folder: Path, values: np.ndarray) -> Took:
    """`add_scalar` for each value, and an EventAccumulator that keeps all of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    names = [f"hidden_rms/layer_{i}" for i in range(values.shape[1])]
    start = time.perf_counter()
    writer = SummaryWriter(str(folder))
    for step, row in enumerate(values.tolist()):
        for name, value in zip(names, row, strict=True):
            writer.add_scalar(name, value, step)
    writer.close()
    written = time.perf_counter() - start
    start = time.perf_counter()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = np.array([[event.value for event in events.Scalars(name)] for name in names], np.float32).T
    read = time.perf_counter() - start
    assert np.array_equal(found, values)
    return {"write": written, "read": read, "bytes": size(folder)}


_TRACKIO = """
import json, sys, time
import numpy as np
from trackio.sqlite_storage import SQLiteStorage
values = np.load(sys.argv[1])
names = [f"hidden_rms/layer_{i}" for i in range(values.shape[1])]
start = time.perf_counter()
for first in range(0, len(values), 100):
    rows = [dict(zip(names, row)) for row in values[first : first + 100].tolist()]
    SQLiteStorage.bulk_log("bench", "run", rows, steps=list(range(first, first + len(rows))))
written = time.perf_counter() - start
start = time.perf_counter()
logs = SQLiteStorage.get_logs("bench", "run")
found = np.array([[row[name] for name in names] for row in logs], np.float32)
read = time.perf_counter() - start
assert np.array_equal(found, values)
print(json.dumps({"write": written, "read": read}))
"""


def trackio(python: str) -> Callable[[Path, np.ndarray], Took]:
    """`bulk_log` of a hundred steps at a time into its database, and `get_logs`."""

    def run(folder: Path, values: np.ndarray) -> Took:
        np.save(folder / "values.npy", values)
        home = folder / "trackio"
        told = subprocess.run(
            [python, "-c", _TRACKIO, str(folder / "values.npy")],
            env={**os.environ, "TRACKIO_DIR": str(home)},
            capture_output=True,
            text=True,
        )
        if told.returncode:
            raise SystemExit(f"trackio failed under {python}: {told.stderr.strip().splitlines()[-1]}")
        return {**json.loads(told.stdout.strip().splitlines()[-1]), "bytes": size(home)}

    return run


def size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
