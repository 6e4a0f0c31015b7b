"""Screenshots of every page: `python benchmarks/screenshots.py FOLDER ...`; needs Chromium and Playwright.

Light and dark, 1280×800 and 1920×1080, into `screenshots/` (`--out`). `--view` is the query of a link, for a choice of
runs or a step; `--whole` takes the page to its end; `--live` takes the demo's runs while they train. `--docs` makes the
pictures of README and docs from `sample_runs`, or from the FOLDER given.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.dashboard import CHART, PAGES, ROOT, served
from probes import RunError, open_run

SIZES = ("1280x800", "1920x1080")
SCHEMES = ("light", "dark")
TALLEST = 6000

# The pictures of README and docs: name, page and view, theme, height, how far it is scrolled.
DOCUMENTED = (
    ("runs", "?runs=prenorm&runs=full&runs=block", "light", 1240, 0),
    ("dilution", "dilution?runs=prenorm&runs=full&runs=block", "light", 800, 0),
    ("dilution-deep", "dilution?runs=deep-prenorm&runs=deep-block", "dark", 800, 0),
    ("gradients", "gradients?runs=prenorm&runs=full&runs=block", "light", 800, 0),
    ("depth-attention", "depth_attention?runs=full&runs=block", "light", 800, 0),
    ("depth-attention-read", "depth_attention?runs=full&focus=full&read=18&source=15", "dark", 1000, 560),
    ("depth-attention-deep", "depth_attention?runs=deep-block", "dark", 800, 0),
    ("tokens", "tokens?runs=full&focus=full&read=18&source=15", "light", 800, 0),
    ("attribution", "attribution?runs=block-24&cause_read=16", "light", 1200, 1320),
    ("compare", "compare?runs=prenorm&runs=full&first=prenorm&second=full", "light", 800, 0),
)
LIVE_STEPS = 20  # of every run, before a live one is taken


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("folders", nargs="*", type=Path, default=[ROOT / "sample_runs"])
    asked.add_argument("--out", type=Path)
    asked.add_argument("--view", default="")
    asked.add_argument("--whole", action="store_true")
    asked.add_argument("--docs", action="store_true")
    asked.add_argument("--live", action="store_true")
    asked.add_argument("--pages", nargs="+", choices=[name or "runs" for name in PAGES])
    asked.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    asked.add_argument("--sizes", nargs="+", default=SIZES)
    given = asked.parse_args()
    out = given.out or (ROOT / "docs" / "images" if given.docs else Path("screenshots"))
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    runs = training() if given.live else contextlib.nullcontext(given.folders)
    with sync_playwright() as playwright, runs as folders, served(*folders) as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        if given.docs:
            for name, view, scheme, height, scroll in DOCUMENTED:
                _take(page, f"{address}/{view}", scheme, 1280, height, out / f"{name}.png", scroll=scroll)
            return
        for name in given.pages or [name or "runs" for name in PAGES]:
            place = f"{address}/{'' if name == 'runs' else name}" + (f"?{given.view}" if given.view else "")
            for scheme in given.schemes:
                for size in given.sizes:
                    width, height = map(int, size.split("x"))
                    _take(
                        page, place, scheme, width, height, out / f"{name}-{scheme}-{size}.png", given.whole
                    )


@contextlib.contextmanager
def training():
    """The folder of a demo that trains, once each of its runs has numbers to show."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "app", "demo", "--runs", folder, "--no-serve", "--steps", "2000"]
        demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not all(_steps(Path(folder) / kind) >= LIVE_STEPS for kind in ("prenorm", "full", "block")):
                if demo.poll() is not None:
                    sys.exit("The demo ended before it could be taken: try `depthscope demo`.")
                time.sleep(1)
            yield [Path(folder)]
        finally:
            demo.terminate()
            demo.wait(60)


def _steps(path: Path) -> int:
    try:
        return open_run(path).last_step
    except RunError:  # not begun
        return -1


def _take(
    page: Page,
    place: str,
    scheme: str,
    width: int,
    height: int,
    path: Path,
    whole: bool = False,
    scroll: int = 0,
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.goto(place)
    _settle(page)
    if whole:
        tall = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size({"width": width, "height": min(max(tall, height), TALLEST)})
        _settle(page)
    page.evaluate("by => document.querySelector('[data-testid=stMain]').scrollTo(0, by)", scroll)
    page.wait_for_timeout(300)
    # All colours are kept: with a palette, the thin coloured lines, or the greys around them, come out wrong.
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1000:.0f} KB")


def _settle(page: Page) -> None:
    """Until every chart of the page is drawn and nothing runs any more."""
    page.wait_for_selector(
        f"{CHART}, [data-testid=stAlert]", timeout=60_000
    )  # or what says why there is none
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=stStatusWidget]') && "
        "[...document.querySelectorAll('.depthscope-chart')].every(c => c.querySelector('canvas, svg'))"
    )
    page.wait_for_timeout(1_200)


if __name__ == "__main__":
    main()
