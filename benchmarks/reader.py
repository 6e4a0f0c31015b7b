"""How fast long runs open: `python -m benchmarks.reader [--save]`, at 1k, 100k and 1M recorded steps of 96 layers.

Each run is made up (benchmarks/long_run.py: all vectors at every recorded step, matrices at every hundredth), compacted, and
opened in new processes: seconds to open it, to the numbers of a first chart, of a layer × step heatmap, of a zoom into a
hundredth of the run and of one layer over all of training; memory of the process. Warm, and cold: with the run's files put
out of the system's cache first (which it says how far that went; needs no rights). Runs of up to `--direct` steps are read without their digest too. `--browser` opens each
run's Dilution page in Chromium: seconds to the first chart, and the server's memory. Medians of `--rounds`.

The 1M run takes 4.4 GB of disk, a minute or two to make and another to compact; all defaults take about ten minutes.
Comparisons with TensorBoard and trackio: benchmarks/writer.py. `--smoke` takes seconds and proves nothing.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    from benchmarks import long_run, provenance, rivals
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.reader` ({error})."
    ) from error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
TOLD = ("open", "chart", "heatmap", "zoom", "layer", "memory")


def measure(path: Path) -> dict[str, float]:
    """Seconds of each in this process, and its memory at the most [MB]; the imports are done before."""
    from app import frames
    from probes import Run

    found, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        found[name] = time.perf_counter() - start
        start = time.perf_counter()

    run = Run(path)
    lap("open")
    steps = run.last_step + 1
    frames.scalar(run, "run", "loss", window=frames.smoothing([run], "loss"))
    frames.profile(run, "run", long_run.SPIKED, run.last_step)
    lap("chart")
    grid = frames.over_training(run, long_run.SPIKED)
    lap("heatmap")
    spike = long_run.spike_step(steps)
    near = frames.scalar(run, "run", "loss", zoom=(spike - steps // 200, spike + steps // 200))
    layer = min(long_run.SPIKE_LAYER, len(run.layers))
    shown = run.series(long_run.SPIKED).bins(2000, spike - steps // 200, spike + steps // 200, [layer])
    lap("zoom")
    course = frames.of_source(run, "run", long_run.SPIKED, layer)
    lap("layer")
    lines = min(float(shown.high.max()), float(course["high"].max()))
    # A cell of the heatmap shows the mean of its steps where the spike is less than ten times as much.
    if not len(near) or lines != long_run.SPIKE or grid["value"].max() < long_run.SPIKE / 10:
        raise SystemExit("The spike is not in every picture.")
    return found | {"memory": memory(os.getpid())}


def memory(pid: int) -> float:
    """The most memory a process has had, in MB."""
    with open(f"/proc/{pid}/status") as file:
        told = dict(line.split(":", 1) for line in file if ":" in line)
    return int(told["VmHWM"].split()[0]) / 1024


def forget(path: Path) -> float:
    """Put the files of a run out of the system's cache, as far as it lets them go; the share of their bytes that stayed.

    Nobody's rights are needed: a clean page that no process maps may be let go. It says nothing of the disk's own cache.
    """
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(map(_cached, files)) / max(1, sum(-(-file.stat().st_size // mmap.PAGESIZE) for file in files))


def _cached(file: Path) -> int:
    """How many pages of a file the system holds in memory."""
    pages = -(-file.stat().st_size // mmap.PAGESIZE)
    held = (ctypes.c_ubyte * pages)()
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        start = (ctypes.c_char * len(view)).from_buffer(view)
        try:
            if ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), held
            ):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del start  # else the view cannot be closed
    return sum(one & 1 for one in held)


def times(path: Path, rounds: int, cold: bool) -> dict[str, float]:
    """Medians of new processes; of warm ones a first does not count."""
    taken = []
    for number in range(rounds + (not cold)):
        stayed = forget(path) if cold else 1.0
        command = [sys.executable, "-m", "benchmarks.reader", "--measure", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        if cold or number:
            taken.append(json.loads(done.stdout) | {"stayed": stayed})
    return {name: statistics.median(each[name] for each in taken) for name in (*TOLD, "stayed")}


def browsed(path: Path, rounds: int) -> dict[str, float]:
    """Seconds to the first chart of the Dilution page, the first time a server opens the run, in later new browsers, and by
    its link in an open dashboard; the server's memory [MB]."""
    from playwright.sync_api import sync_playwright

    from benchmarks.dashboard import CHART, served, turning

    pids: list[int] = []
    with sync_playwright() as playwright, served(path.parent, tell=pids.append) as address:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        taken = []
        for _ in range(rounds + 1):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            start = time.perf_counter()
            page.goto(f"{address}/dilution")
            page.wait_for_selector(CHART, timeout=120_000)
            taken.append(time.perf_counter() - start)
            page.wait_for_timeout(1000)
            page.close()
        link = turning(browser.new_page(viewport={"width": 1280, "height": 800}), address, "dilution")
        browser.close()
        again = statistics.median(taken[1:])
        return {"first": taken[0], "again": again, "link": link, "memory": memory(pids[0])}


def study(folder: Path, steps: int, told: argparse.Namespace) -> dict:
    path = folder / f"{steps}" / "run"
    start = time.perf_counter()
    size = long_run.make(path, steps, told.layers)
    made = time.perf_counter() - start
    found: dict = {"steps": steps, "bytes": size, "make": made}
    if steps <= told.direct:
        found["direct"] = times(path, told.rounds, cold=False)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "app", "compact", str(path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    found["compact"] = time.perf_counter() - start
    found["digest"] = rivals.size(path / "rank-00000" / "digest")
    found["warm"] = times(path, told.rounds, cold=False)
    found["cold"] = times(path, told.rounds, cold=True)
    if told.browser:
        found["browser"] = browsed(path, told.rounds)
    shutil.rmtree(path)
    return found


def table(found: list[dict]) -> list[str]:
    lines = [
        "| recorded steps | shards, MB | digest, MB | | open, s | first chart, s | heatmap, s | zoom, s | one layer, s | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        for how in ("warm", "cold", "direct"):
            if how in one:
                cells = [f"{one[how][name]:.3f}" for name in TOLD[:-1]] + [f"{one[how]['memory']:.0f}"]
                label = "warm, without digest" if how == "direct" else how
                lines.append(
                    f"| {one['steps']:,} | {one['bytes'] / 1e6:,.0f} | {one['digest'] / 1e6:,.0f} | {label} | {' | '.join(cells)} |"
                )
    stayed = max((one["cold"]["stayed"] for one in found if "cold" in one), default=0.0)
    lines += [
        "",
        f"Cold: at most {stayed:.1%} of a run's bytes were in the system's cache when a process began.",
    ]
    browsers = [one for one in found if "browser" in one]
    if browsers:
        lines += [
            "",
            "In the browser, until the first chart of the Dilution page. A new browser loads Streamlit's page first:",
            "",
        ]
        lines += [
            "| recorded steps | first visit, s | in a new browser, s | by its link, s | server's memory, MB |",
            "|---|---|---|---|---|",
        ]
        for one in browsers:
            told = one["browser"]
            lines.append(
                f"| {one['steps']:,} | {told['first']:.2f} | {told['again']:.2f} | {told['link']:.2f} | {told['memory']:.0f} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--direct", type=int, default=100_000, help="read without a digest up to so many steps"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the runs are made, and deleted again (default: temporary)"
    )
    parser.add_argument("--browser", action="store_true", help="needs Chromium and Playwright")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/reader.json and .md")
    parser.add_argument("--out", type=Path, default=RESULTS / "reader.json", help="where --save writes")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if told.measure:
        print(json.dumps(measure(told.measure)))
        return
    from probes.provenance import processor  # which imports torch: not into what is measured

    if told.smoke:
        told.steps, told.layers, told.rounds = [300], 4, 1
    with tempfile.TemporaryDirectory(dir=told.folder) as folder:
        found = [study(Path(folder), steps, told) for steps in told.steps]
    lines = [
        f"`{provenance.command('reader', arguments)}`, commit {provenance.commit()}, {processor()}, "
        f"Python {platform.python_version()}. {told.layers} layers, medians of {told.rounds} processes.",
        "",
        *table(found),
    ]
    print("\n".join(lines))
    if told.save:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(json.dumps(found, indent=1))
        told.out.with_suffix(".md").write_text("\n".join(["# Reading", "", *lines, ""]))


if __name__ == "__main__":
    main()
