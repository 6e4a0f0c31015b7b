"""How quick the dashboard feels: `python -m benchmarks.dashboard [--save]`; needs Chromium and Playwright.

Medians, of made-up runs or of those in FOLDER: from the command to the first chart in an open browser; opening each page on a
warm server until its first chart, and turning to it by its link in an open dashboard; a frame of playback while the slider is
dragged, with 24, 64 and 200 layers; and, for a run that grows, the time from a sealed shard to its step on screen.

It takes about ten minutes. `--smoke` takes two, and proves nothing. Long runs: benchmarks/reader.py.
"""

import argparse
import contextlib
import json
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

try:
    from playwright.sync_api import Page, sync_playwright

    from benchmarks import provenance
    from probes.writer import RunWriter
    from tests.app import made
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.dashboard`, with Playwright installed ({error})."
    ) from error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PATIENCE = (
    300.0  # seconds that a server or a page may take: a busy machine is slow, and says so in the figures
)

PAGES = ("", "dilution", "gradients", "depth_attention", "tokens", "attribution", "compare")
TITLES = {"": "Runs", "depth_attention": "Depth attention"}
DEPTHS = (12, 32, 100)  # transformer blocks whose triangles are played
CHART = ".depthscope-chart :is(canvas, svg)"
DRAWN = """() => {
    const charts = [...document.querySelectorAll('.depthscope-chart')];
    const seen = charts.filter(chart => chart.getBoundingClientRect().top < innerHeight);
    return seen.length > 0 && seen.every(chart => chart.querySelector('canvas, svg'));
}"""
LIVE = "Number(document.body.innerText.match(/running, step ([\\d,]+)/)?.[1].replace(/,/g, ''))"


@contextlib.contextmanager
def served(*folders: Path, tell: Callable[[int], object] = lambda pid: None):
    """The address of the real command's server on some folders; `tell` hears its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "dash", *map(str, folders), "--port", str(port), "--no-browser"]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        tell(server.pid)
        try:
            _wait_for(f"http://127.0.0.1:{port}/_stcore/health", server, said)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(PATIENCE)


def _wait_for(address: str, server: subprocess.Popen, said: BinaryIO) -> None:
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=1)
            return
        time.sleep(0.05)
    why = "ended" if server.poll() is not None else f"did not answer within {PATIENCE:.0f} s"
    said.seek(0)
    raise SystemExit(f"The dashboard's server {why}. It said:\n{said.read().decode(errors='replace')}")


def starting(page: Page, folder: Path, rounds: int) -> float:
    """Seconds from the command, on a server that is not there yet, to the first chart; median."""
    took = []
    for _ in range(rounds):
        start = time.monotonic()
        with served(folder) as address:
            page.goto(address)
            page.wait_for_selector(CHART)
            took.append(time.monotonic() - start)
    return statistics.median(took)


def opening(page: Page, address: str, name: str, rounds: int) -> float:
    """Seconds until the first chart, median after one to warm up."""
    took = []
    for _ in range(rounds + 1):
        start = time.monotonic()
        page.goto(f"{address}/{name}")
        page.wait_for_selector(CHART)
        took.append(time.monotonic() - start)
    return statistics.median(took[1:])


def turning(page: Page, address: str, name: str, rounds: int) -> float:
    """Seconds from a click on the page's link to all charts in sight, median after one to warm up."""
    before = "gradients" if name != "gradients" else "dilution"
    took = []
    for _ in range(rounds + 1):
        page.goto(f"{address}/{before}")
        page.wait_for_function(DRAWN)
        page.wait_for_timeout(1500)
        page.evaluate(
            "document.querySelectorAll('.depthscope-chart').forEach(chart => (chart.dataset.old = 1))"
        )
        start = time.monotonic()
        page.get_by_role("link", name=title(name), exact=True).click()
        page.wait_for_function(f"() => !document.querySelector('.depthscope-chart[data-old]') && ({DRAWN})()")
        took.append(time.monotonic() - start)
    return statistics.median(took[1:])


def title(name: str) -> str:
    return TITLES.get(name, name.capitalize())


def scrubbing(page: Page, address: str) -> tuple[float, int]:
    """Median milliseconds from a move of the player to a redrawn triangle, and how many moves were measured."""
    page.goto(f"{address}/depth_attention")
    page.wait_for_function(DRAWN)
    page.wait_for_timeout(1500)
    took = page.evaluate(
        """async () => {
            const range = document.querySelector('.depthscope-player input');
            const chart = document.querySelector('.depthscope-chart');
            const took = [];
            for (let at = Number(range.max) - 1; at >= 0 && took.length < 30; at--) {
                const before = chart.dataset.step, start = performance.now();
                range.value = at;
                range.dispatchEvent(new Event('input'));
                while (chart.dataset.step === before && performance.now() - start < 2000)
                    await new Promise(requestAnimationFrame);
                if (chart.dataset.step !== before) took.push(performance.now() - start);
            }
            return took;
        }"""
    )
    return (statistics.median(took) if took else float("nan")), len(took)


def growing(page: Page, count: int) -> list[float]:
    """Seconds from a sealed shard to its step on the page, for so many shards."""
    with tempfile.TemporaryDirectory() as folder:
        told = made.manifest("full", blocks=12)
        writer = RunWriter(Path(folder) / "growing", told)
        sealed: dict[int, float] = {}
        stop = threading.Event()

        def seals() -> None:
            shards = Path(folder) / "growing" / "rank-00000"
            while not stop.wait(0.02):
                for shard in shards.glob("*.safetensors"):
                    sealed.setdefault(int(shard.stem.split("-")[1]), time.monotonic())

        def train() -> None:
            step = 0
            while not stop.wait(0.1):
                rows = list(made.rows("full", told.layout, step))
                writer.put(lambda rows=rows: rows, step)
                step += 10

        threads = [threading.Thread(target=work, daemon=True) for work in (seals, train)]
        for thread in threads:
            thread.start()
        took = []
        try:
            with served(Path(folder)) as address:
                page.goto(address)
                page.wait_for_selector(CHART)
                seen = page.evaluate(LIVE)
                while len(took) < count:
                    page.wait_for_function(f"seen => {LIVE} > seen", arg=seen, polling=20)
                    seen = page.evaluate(LIVE)
                    took.append(time.monotonic() - sealed[seen])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            writer.close("finished")
        return took


def study(page: Page, given: Path | None, told: argparse.Namespace) -> dict:
    """What is measured, in seconds and milliseconds."""
    found: dict = {"pages": {}, "playback": []}
    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            given = Path(folder)
            for variant in ("prenorm", "full", "block"):
                made.run(given / variant, variant, blocks=12, steps=51)
                if variant != "prenorm":
                    made.follow(given / variant, range(0, 510, 50))
                made.attribution(given / variant)
        found["start"] = starting(page, given, max(1, told.rounds // 2 + told.rounds % 2))
        with served(given) as address:
            for name in PAGES:
                found["pages"][title(name)] = {
                    "open": opening(page, address, name, told.rounds),
                    "turn": turning(page, address, name, told.rounds),
                }
    for blocks in told.blocks:
        with tempfile.TemporaryDirectory() as folder:
            made.run(Path(folder) / "full", "full", blocks=blocks, steps=31)
            with served(Path(folder)) as address:
                median, count = scrubbing(page, address)
        found["playback"].append({"layers": 2 * blocks, "ms": median, "frames": count})
    found["live"] = growing(page, 2 * told.rounds)
    return found


def table(found: dict) -> list[str]:
    live = found["live"]
    return [
        f"From the command to the first chart, on a server that is not there yet: {found['start']:.2f} s.",
        "",
        "| page | open until its first chart, s | turn to it in an open dashboard, s |",
        "|---|---|---|",
        *(f"| {name} | {took['open']:.2f} | {took['turn']:.2f} |" for name, took in found["pages"].items()),
        "",
        "| layers | a frame of playback, ms | frames |",
        "|---|---|---|",
        *(f"| {one['layers']} | {one['ms']:.0f} | {one['frames']} |" for one in found["playback"]),
        "",
        f"From a sealed shard to its step on screen: {statistics.median(live):.2f} s, {max(live):.2f} s at most of "
        f"{len(live)}.",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="runs of your own (default: made-up ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=DEPTHS, help="transformer blocks whose playback is measured"
    )
    parser.add_argument("--smoke", action="store_true", help="once each")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/dashboard.json and .md")
    parser.add_argument("--out", type=Path, default=RESULTS / "dashboard.json", help="where --save writes")
    told = parser.parse_args(arguments)
    from probes.provenance import processor

    if told.smoke:
        told.rounds, told.blocks = 1, DEPTHS[:1]
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * PATIENCE)
        found = study(page, told.folder, told)
        browser.close()
    runs = (
        "Made-up runs of 24 layers, 51 recorded steps"
        if told.folder is None
        else f"Runs of {told.folder.name}"
    )
    lines = [
        f"`{provenance.command('dashboard', arguments)}`, commit {provenance.commit()}, {processor()}, "
        f"Python {platform.python_version()}. {runs}; medians of {told.rounds}.",
        "",
        *table(found),
    ]
    print("\n".join(lines))
    if told.save:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(json.dumps(found, indent=1))
        told.out.with_suffix(".md").write_text("\n".join(["# The dashboard", "", *lines, ""]))


if __name__ == "__main__":
    main()
