"""How quick the dashboard feels: `python benchmarks/dashboard.py [FOLDER]`; needs Chromium and Playwright.

Prints medians: from the command to the first chart in an open browser; opening each page on a warm server until its
first chart, and turning to it by its link in an open dashboard; a frame of playback while the slider is dragged, with
24, 64 and 200 layers; and, for a run that grows, the time from a sealed shard to its step on screen.
"""

import contextlib
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

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from probes.writer import RunWriter  # noqa: E402
from tests.app import made  # noqa: E402

PAGES = ("", "dilution", "gradients", "depth_attention", "tokens", "attribution", "compare")
TITLES = {"": "Runs", "depth_attention": "Depth attention"}
DEPTHS = (12, 32, 100)  # transformer blocks whose triangles are played
CHART = ".depthscope-chart :is(canvas, svg)"
DRAWN = """() => {
    const charts = [...document.querySelectorAll('.depthscope-chart')];
    const seen = charts.filter(chart => chart.getBoundingClientRect().top < innerHeight);
    return seen.length > 0 && seen.every(chart => chart.querySelector('canvas, svg'));
}"""
LIVE = "Number(document.body.innerText.match(/live, step ([\\d,]+)/)?.[1].replace(/,/g, ''))"


@contextlib.contextmanager
def served(*folders: Path, tell: Callable[[int], object] = lambda pid: None):
    """The address of the real command's server on some folders; `tell` hears its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "dash", *map(str, folders), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tell(server.pid)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def starting(page: Page, folder: Path) -> float:
    """Seconds from the command, on a server that is not there yet, to the first chart; median of three."""
    took = []
    for _ in range(3):
        start = time.monotonic()
        with served(folder) as address:
            page.goto(address)
            page.wait_for_selector(CHART, timeout=60_000)
            took.append(time.monotonic() - start)
    return statistics.median(took)


def opening(page: Page, address: str, name: str) -> float:
    """Seconds until the first chart, median of five after one to warm up."""
    took = []
    for _ in range(6):
        start = time.monotonic()
        page.goto(f"{address}/{name}")
        page.wait_for_selector(CHART)
        took.append(time.monotonic() - start)
    return statistics.median(took[1:])


def turning(page: Page, address: str, name: str) -> float:
    """Seconds from a click on the page's link to all charts in sight, median of five after one to warm up."""
    before = "gradients" if name != "gradients" else "dilution"
    took = []
    for _ in range(6):
        page.goto(f"{address}/{before}")
        page.wait_for_function(DRAWN)
        page.wait_for_timeout(1500)
        page.evaluate(
            "document.querySelectorAll('.depthscope-chart').forEach(chart => (chart.dataset.old = 1))"
        )
        start = time.monotonic()
        page.get_by_role("link", name=TITLES.get(name, name.capitalize()), exact=True).click()
        page.wait_for_function(f"() => !document.querySelector('.depthscope-chart[data-old]') && ({DRAWN})()")
        took.append(time.monotonic() - start)
    return statistics.median(took[1:])


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


def growing(page: Page) -> list[float]:
    """Seconds from a sealed shard to its step on the page, for ten shards."""
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
                page.wait_for_selector(CHART, timeout=60_000)
                seen = page.evaluate(LIVE)
                while len(took) < 10:
                    page.wait_for_function(f"seen => {LIVE} > seen", arg=seen, polling=20)
                    seen = page.evaluate(LIVE)
                    took.append(time.monotonic() - sealed[seen])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            writer.close("finished")
        return took


def main() -> None:
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as made_runs:
        if given is None:
            given = Path(made_runs)
            for variant in ("prenorm", "full", "block"):
                made.run(given / variant, variant, blocks=12, steps=51)
                if variant != "prenorm":
                    made.follow(given / variant, range(0, 510, 50))
                made.attribution(given / variant)
            print("Made runs of 24 layers, 51 recorded steps.")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        print(f"command to chart     {starting(page, given):.2f} s")
        with served(given) as address:
            for name in PAGES:
                print(f"open {name or 'runs':<16} {opening(page, address, name):.2f} s", end="")
                print(f", turn to it {turning(page, address, name):.2f} s")
        for blocks in DEPTHS:
            with tempfile.TemporaryDirectory() as folder:
                made.run(Path(folder) / "full", "full", blocks=blocks, steps=31)
                with served(Path(folder)) as address:
                    median, count = scrubbing(page, address)
            print(f"a frame of playback  {median:.0f} ms with {2 * blocks} layers (median of {count})")
        took = growing(page)
        print(
            f"shard to screen      {statistics.median(took):.2f} s median, {max(took):.2f} s at most of {len(took)}"
        )
        browser.close()


if __name__ == "__main__":
    main()
