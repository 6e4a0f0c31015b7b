"""Does memory stay flat? `python -m benchmarks.soak [--minutes 30] [--save]`; needs Linux, Chromium and Playwright.

A small Full AttnRes model trains as fast as it can and records every step, in a process of its own, while a browser turns the
pages of the real dashboard over that growing run. Every few seconds: resident memory, open files and threads of both
processes. A digest is made behind the writer after every `--rows` steps instead of 32,768, so that there are many.

The table has a row a minute, medians; below it the trend after `--warm` minutes, in MiB an hour, with its 95 % interval.
"Flat": the trend could be none, or is below `--tolerance`. It is no figure of speed: a busy machine is fine. `--smoke` takes
half a minute and proves nothing.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

try:
    from benchmarks import provenance
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.soak` ({error})."
    ) from error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
WHO = ("recorder", "dashboard")


@dataclass(frozen=True)
class Sample:
    """One look at a process, `at` seconds after the start: resident memory in MiB, open files, threads."""

    who: str
    at: float
    memory: float
    files: int
    threads: int


def look(who: str, pid: int, at: float) -> Sample:
    """Raises OSError for a process that is gone, or about to go."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmRSS" not in told:
        raise ProcessLookupError(f"process {pid} has ended")
    return Sample(
        who,
        at,
        int(told["VmRSS"].split()[0]) / 1024,
        len(os.listdir(f"/proc/{pid}/fd")),
        int(told["Threads"]),
    )


def trend(minutes: np.ndarray, memory: np.ndarray) -> tuple[float, float]:
    """Slope of a line through the medians of minutes, per hour, and half of its 95 % interval.

    Neighbouring minutes resemble each other: as many of them count as would be independent (their number times
    (1 - r) / (1 + r), with the correlation r of neighbouring residuals).
    """
    count = len(minutes)
    if count < 4:
        return math.nan, math.inf
    slope, intercept = np.polyfit(minutes, memory, 1)
    left = memory - (slope * minutes + intercept)
    power = float(left @ left)
    r = min(max(float(left[1:] @ left[:-1]) / power, 0.0), 0.95) if power else 0.0
    independent = max(count * (1 - r) / (1 + r), 3.0)
    error = math.sqrt(power / (independent - 2) / (count * float(np.var(minutes))) * count / independent)
    return 60 * float(slope), 60 * _student(independent - 2) * error


def _student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, by its expansion round the normal one."""
    z = statistics.NormalDist().inv_cdf(0.975)
    if freedom < 3:
        return 12.7 if freedom < 2 else 4.3
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def by_minute(samples: list[Sample], who: str) -> dict[int, dict[str, float]]:
    """Medians of each whole minute."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.who == who:
            found.setdefault(int(sample.at // 60), []).append(sample)
    return {
        minute: {
            what: statistics.median(getattr(one, what) for one in some)
            for what in ("memory", "files", "threads")
        }
        for minute, some in sorted(found.items())
    }


def verdict(samples: list[Sample], who: str, warm: float, tolerance: float) -> tuple[bool, str]:
    """Whether a process stayed flat, and a sentence."""
    after = {
        minute: told["memory"] for minute, told in by_minute(samples, who).items() if minute + 0.5 >= warm
    }
    slope, half = trend(np.array([*after], float), np.array([*after.values()]))
    if math.isnan(slope):
        return False, f"The {who} was watched for too short a time to tell."
    flat = slope - half <= 0 or slope + half <= tolerance
    late = [one for one in samples if one.who == who and one.at >= 60 * warm]
    more = f"open files {_span(one.files for one in late)}, threads {_span(one.threads for one in late)}"
    how = "flat" if flat else "**not flat**"
    return flat, f"The {who} is {how}: {slope:+.1f} ± {half:.1f} MiB an hour; {more}."


def _span(numbers) -> str:
    numbers = list(numbers)
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


# Both processes


def record(folder: Path, seconds: float, rows: int) -> None:
    """Train and record at every step; the last line says what was recorded."""
    import torch

    import probes
    from attnres import Decoder, DecoderConfig
    from probes import compacting

    torch.set_num_threads(1)
    torch.manual_seed(0)
    compacting.ROWS = rows
    model = Decoder(DecoderConfig(width=32, heads=2, kv_heads=1, blocks=4, context=16, residual="full"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    end, step = time.monotonic() + seconds, 0
    with probes.record(
        model, folder, optimizer=optimizer, every=1, matrices_every=20, tokens_every=2000
    ) as kept:
        while time.monotonic() < end:
            text = torch.randint(0, 256, (2, 17))
            logits = model(text[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.log(loss=loss)
            step += 1
    end = json.loads((folder / "end.json").read_text())
    digests = len(list(folder.glob("rank-00000/digest/*.safetensors")))
    told = {"steps": step, "shards": end["shards"], "dropped": end["dropped"], "digests": digests}
    print(json.dumps(told), flush=True)


def watch(folder: Path, told: argparse.Namespace) -> tuple[list[Sample], dict]:
    """Samples of both while the recorder trains, and what it recorded."""
    from playwright.sync_api import Error, sync_playwright

    from benchmarks.dashboard import CHART, PAGES, served

    seconds = 60 * told.minutes
    command = [sys.executable, "-m", "benchmarks.soak", "--record", str(folder / "run")]
    recorder = subprocess.Popen(
        [*command, "--minutes", str(told.minutes), "--rows", str(told.rows)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = {"recorder": recorder.pid}
    samples: list[Sample] = []
    seen = {"pages": 0, "without a chart": 0}
    try:
        with (
            sync_playwright() as playwright,
            served(folder, tell=lambda pid: pids.update(dashboard=pid)) as at,
        ):
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            start = looked = time.monotonic()
            for name in cycle(PAGES):
                try:
                    page.goto(f"{at}/{name}", timeout=60_000)
                    page.wait_for_selector(CHART, timeout=20_000)
                    seen["pages"] += 1
                except Error:  # the page of attributions has none
                    seen["without a chart"] += 1
                turned = time.monotonic()
                while time.monotonic() - turned < told.stay:  # it follows the run meanwhile
                    page.wait_for_timeout(500)
                    if time.monotonic() - looked >= told.look:
                        looked = time.monotonic()
                        if recorder.poll() is not None:
                            break
                        with contextlib.suppress(OSError):  # the recorder has ended meanwhile
                            samples += [look(who, pid, looked - start) for who, pid in pids.items()]
                if recorder.poll() is not None or time.monotonic() - start > seconds + 300:
                    break
            browser.close()
        out, _ = recorder.communicate(timeout=120)
    finally:
        recorder.kill()
        recorder.wait()
    if recorder.returncode:
        raise SystemExit("The recorder failed.")
    return samples, {**json.loads(out.splitlines()[-1]), **seen}


def table(samples: list[Sample]) -> list[str]:
    lines = [
        "| minute | recorder, MiB | files | threads | dashboard, MiB | files | threads |",
        "|---|---|---|---|---|---|---|",
    ]
    one, other = (by_minute(samples, who) for who in WHO)
    for minute in sorted(set(one) & set(other)):
        cells = [
            f"{told[minute]['memory']:.1f} | {told[minute]['files']:.0f} | {told[minute]['threads']:.0f}"
            for told in (one, other)
        ]
        lines.append(f"| {minute} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm", type=float, default=8, help="minutes that do not count")
    parser.add_argument("--rows", type=int, default=4096, help="steps after which a digest is made")
    parser.add_argument("--stay", type=float, default=10, help="seconds on each page")
    parser.add_argument("--look", type=float, default=5, help="seconds between samples")
    parser.add_argument("--tolerance", type=float, default=10, help="MiB an hour that nobody minds")
    parser.add_argument("--smoke", action="store_true", help="half a minute")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak.json and .md")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json", help="where --save writes")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if told.smoke:
        told.minutes, told.warm, told.stay, told.look, told.rows = 0.5, 0, 2, 1, 200
    if told.record:
        record(told.record, 60 * told.minutes, told.rows)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        samples, recorded = watch(Path(folder), told)
    verdicts = [verdict(samples, who, told.warm, told.tolerance) for who in WHO]
    lines = [
        f"`{provenance.command('soak', arguments)}`, commit {provenance.commit()}, Python {platform.python_version()}.",
        "",
        f"{recorded['steps']:,} recorded steps, {recorded['shards']} shards, {recorded['digests']} files of a digest, "
        f"{recorded['dropped']} hand-overs dropped; {recorded['pages'] + recorded['without a chart']} pages turned, "
        f"{recorded['without a chart']} of them without a chart. The trend leaves out the first {told.warm:g} minutes.",
        "",
        *(sentence for _, sentence in verdicts),
        "",
        *table(samples),
    ]
    print("\n".join(lines))
    if told.save:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {"recorded": recorded, "minutes": {who: by_minute(samples, who) for who in WHO}}
        told.out.write_text(json.dumps(kept, indent=1))
        told.out.with_suffix(".md").write_text("\n".join(["# Soak", "", *lines, ""]))
    return 0 if told.smoke or all(flat for flat, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
