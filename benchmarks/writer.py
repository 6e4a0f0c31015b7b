"""How fast and how small recorded numbers are written: `python -m benchmarks.writer [--save]`.

First what the writer's thread makes of rows that a deep model hands it as fast as it takes them, each row one recorded step
with all vectors: rows a second, bytes a row and a value, digests made meanwhile. Then the same few tags by depthscope, TensorBoard's SummaryWriter and, with
`--trackio PYTHON` (an interpreter that has it), trackio: seconds to write, to read all back as arrays, and bytes a value;
ratios within a round, medians over rounds; what has half a million rows or more is written once. The defaults take about
eight minutes and 4 GB of disk; `--smoke` takes seconds and proves nothing.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

try:
    from benchmarks import long_run, provenance, rivals
    from probes.attempts import row_shape
    from probes.manifest import Manifest
    from probes.provenance import processor
    from probes.writer import RunWriter
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.writer` ({error})."
    ) from error

RESULTS = Path(__file__).parent / "results"
ONCE = 500_000  # rows from which on there is one round


def rows(folder: Path, steps: int, layers: int) -> dict[str, float]:
    """Rows a second, and bytes a row, of all vectors of a deep model."""
    shape = long_run.layout(layers)
    random = np.random.default_rng(0)
    made = [
        [
            (name, random.normal(1, 0.1, row_shape(name, shape)).astype(np.float32))
            for name in long_run.VECTORS
        ]
        for _ in range(16)
    ]
    start = time.perf_counter()
    writer = RunWriter(folder / "run", Manifest(shape, time.time(), 1, 100))
    for step in range(steps):
        row = made[step % len(made)]
        writer.put(lambda step=step, row=row: [(name, step, value) for name, value in row], step)
        while writer._queue.qsize() > 200:
            time.sleep(0.001)
    writer.close("finished")
    took = time.perf_counter() - start
    width = sum(value.size for _, value in made[0])
    shards = sum(path.stat().st_size for path in (folder / "run" / "rank-00000").glob("*.safetensors"))
    return {
        "rows": steps,
        "rows_per_second": steps / took,
        "bytes_per_row": shards / steps,
        "bytes_per_value": shards / steps / width,
        "with_digest": rivals.size(folder) / steps / width,
        "dropped": writer.dropped,
    }


def against(contenders: dict, steps: int, tags: int, rounds: int) -> dict[str, list[rivals.Took]]:
    """What each took in each round."""
    found: dict[str, list[rivals.Took]] = {name: [] for name in contenders}
    for number in range(rounds):
        values = np.random.default_rng(number).normal(1, 0.1, (steps, tags)).astype(np.float32)
        for name, take in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(take(Path(folder), values))
    return found


def sizes(alone: list[list[dict[str, float]]]) -> list[str]:
    """Rows of markdown: medians for each number of rows."""
    lines = [
        "| recorded steps | rows a second | bytes a row | bytes a value | with the digest | dropped |",
        "|---|---|---|---|---|---|",
    ]
    for rounds in alone:
        one = {what: statistics.median(each[what] for each in rounds) for what in rounds[0]}
        lines.append(
            f"| {one['rows']:,.0f} | {one['rows_per_second']:,.0f} | {one['bytes_per_row']:,.0f} | "
            f"{one['bytes_per_value']:.2f} | {one['with_digest']:.2f} | {one['dropped']:.0f} |"
        )
    return lines


def table(found: dict[str, list[rivals.Took]], values: int) -> list[str]:
    """Rows of markdown: medians, and in brackets how many times as much as depthscope."""
    lines = ["| | write, s | read all, s | bytes a value |", "|---|---|---|---|"]
    own = found["depthscope"]
    for name, took in found.items():
        cells = []
        for what in ("write", "read", "bytes"):
            value = statistics.median(each[what] for each in took)
            ratio = statistics.median(each[what] / one[what] for each, one in zip(took, own, strict=True))
            shown = f"{value / values:.1f}" if what == "bytes" else f"{value:.3g}"
            cells.append(shown if name == "depthscope" else f"{shown} ({ratio:.3g}×)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000, 100_000, 1_000_000],
        help="recorded steps of the first part",
    )
    parser.add_argument("--steps", type=int, default=10_000, help="recorded steps of the comparison")
    parser.add_argument("--tags", type=int, default=97, help="values a step of the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where runs are made, and deleted again (default: temporary)"
    )
    parser.add_argument("--trackio", metavar="PYTHON", help="an interpreter that has trackio")
    parser.add_argument("--no-tensorboard", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/writer.json and .md")
    parser.add_argument("--out", type=Path, default=RESULTS / "writer.json", help="where --save writes")
    told = parser.parse_args(arguments)
    if told.smoke:
        told.layers, told.rows, told.steps, told.tags, told.rounds = 4, [50, 60], 40, 5, 1
    contenders = {"depthscope": rivals.depthscope}
    if not told.no_tensorboard:
        contenders["TensorBoard"] = rivals.tensorboard
    if told.trackio:
        contenders["trackio"] = rivals.trackio(told.trackio)
    alone: list[list[dict[str, float]]] = []
    for count in told.rows:
        alone.append([])
        for _ in range(told.rounds if count < ONCE else 1):
            with tempfile.TemporaryDirectory(dir=told.folder) as folder:
                alone[-1].append(rows(Path(folder), count, told.layers))
    found = against(contenders, told.steps, told.tags, told.rounds)
    lines = [
        f"`{provenance.command('writer', arguments)}`, commit {provenance.commit()}, {processor()}, "
        f"Python {platform.python_version()}. Medians of {told.rounds}.",
        "",
        f"All vectors of {told.layers} layers:",
        "",
        *sizes(alone),
        "",
        f"{told.tags} tags at {told.steps:,} steps; in brackets how many times as much as depthscope:",
        "",
        *table(found, told.steps * told.tags),
    ]
    print("\n".join(lines))
    if told.save:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        sizes_told = {name: getattr(told, name) for name in ("layers", "rows", "steps", "tags", "rounds")}
        told.out.write_text(json.dumps({"rows": alone, "against": found, "told": sizes_told}, indent=1))
        told.out.with_suffix(".md").write_text("\n".join(["# Writing", "", *lines, ""]))


if __name__ == "__main__":
    main()
