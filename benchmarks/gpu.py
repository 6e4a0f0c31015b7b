"""All that wants a GPU, in one command that goes on where it stopped: `python -m benchmarks.gpu --minutes 9 --out DIR`.

The sample runs, attribution on their checkpoints, what recording costs and what AttnRes costs, the most important first;
give it again until it says that all is there. No part begins that would not be done in time, and one that fails is told
and left behind. What is worth keeping is packed into DIR/gpu.zip, without checkpoints, after every stretch.

    python -m benchmarks.gpu --plan                  # what there is to do, and how long it should take on an H200
    python -m benchmarks.gpu --smoke                 # every part, tiny, in DIR/smoke: on a CPU too, in some minutes
    python -m benchmarks.gpu --place DIR/gpu.zip     # runs into sample_runs/, tables into benchmarks/results/
    python -m benchmarks.gpu --from DIR/gpu.zip …    # go on in an empty DIR, on another machine say

It takes Python 3.11, torch, numpy, safetensors and tqdm, and no network; each part says what it lacks. Packages can be
brought as wheels, in a folder given by `--wheels`:

    python -m pip download --no-deps -d wheels fla-core liger-kernel einops click
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    from benchmarks import provenance
    from benchmarks.packing import DONE, LOGS, PACKED, ROOT, pack, place, unpacked
    from benchmarks.parts import RUNS, Part, parts
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.gpu` ({error})."
    ) from error

NEEDED = ("torch", "numpy", "safetensors", "tqdm")
SITE = "site"
PACKING = 15
"""Seconds that are kept for the end of a stretch."""


@dataclass
class Running:
    """A part at work."""

    part: Part
    process: subprocess.Popen
    begun: float = field(default_factory=time.monotonic)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.place:
        place(options.place)
        return 0
    # Parts run in the repository's root, and their commands are kept: they should not tell of this machine.
    folder = options.out.relative_to(ROOT) if options.out.is_relative_to(ROOT) else options.out
    every = parts(folder, options.device, options.text, options.smoke)
    every = [part for part in every if not options.only or part.name in options.only]
    if options.plan:
        print(plan(every))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume:
        unpacked(options.resume, options.out)
    if options.wheels:
        installed(options.wheels, options.out / SITE)
    site(options.out / SITE)
    if missing := [name for name in NEEDED if not there(name)]:
        sys.exit(
            f"{', '.join(missing)} is missing: install it, or bring its wheel with --wheels (see --help)."
        )
    if options.commit:
        os.environ[provenance.COMMIT] = options.commit
    if provenance.commit().startswith("unknown"):
        print("git does not tell the commit here, and results should name it: say it with --commit.")
    if options.retry:
        for part in every:
            if told(part, options.out).get("code"):
                mark(part, options.out).unlink()
    if options.device.startswith("cuda") and not has_gpu():
        sys.exit(
            "torch sees no GPU here. --smoke tries every part on the CPU, and proves nothing but that it runs."
        )
    with contextlib.suppress(KeyboardInterrupt):
        stretch(every, options)
    pack(options.out, options.smoke)
    return summary(every, options)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this stretch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu", metavar="DIR")
    parser.add_argument("--device", help="default: cuda, or with --smoke what there is")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts alone")
    parser.add_argument("--at-once", type=int, default=3, help="recordings and attributions side by side")
    parser.add_argument("--text", type=Path, help="what to learn (default: Python's own library)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to use besides")
    parser.add_argument("--commit", help="of these files, where there is no git to tell")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--from", dest="resume", type=Path, metavar="FILE", help="what was packed elsewhere")
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and stop")
    parser.add_argument(
        "--place", type=Path, metavar="FILE", help="put what was packed where it belongs, and stop"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="every part, tiny; proves nothing but that it runs"
    )
    options = parser.parse_args(arguments)
    # Apart, so that nobody takes a tiny part for a real one that is done.
    options.out = options.out.resolve() / ("smoke" if options.smoke else "")
    options.text = options.text and options.text.resolve()
    options.device = options.device or ("cpu" if options.smoke and not has_gpu() else "cuda")
    return options


def has_gpu() -> bool:
    if not there("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def plan(every: list[Part]) -> str:
    lines = ["| part | seconds | alone | needs | command |", "|---|---|---|---|---|"]
    for part in every:
        alone, needs = "yes" if part.alone else "", ", ".join(part.needs).replace("|", " or ")
        lines.append(
            f"| {part.name} | {part.seconds:.0f} | {alone} | {needs} | `{shlex.join(['python', *part.words])}` |"
        )
    beside = sum(part.seconds for part in every if not part.alone)
    alone = sum(part.seconds for part in every if part.alone)
    return "\n".join(
        [*lines, f"\n{beside / 60:.0f} minutes that may lie side by side, and {alone / 60:.0f} alone."]
    )


# What is there already


def mark(part: Part, out: Path) -> Path:
    return out / DONE / f"{part.name}.json"


def told(part: Part, out: Path) -> dict:
    """What became of a part: its exit code and seconds; empty before."""
    path = mark(part, out)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def lacks(part: Part, every: list[Part], out: Path) -> str | None:
    """Why a part cannot begin, in words, or None."""
    for needed in part.needs:
        if not any(there(name) for name in needed.split("|")):
            return f"it needs {needed.replace('|', ' or ')}"
    if part.after and part.after in [each.name for each in every]:
        (before,) = [each for each in every if each.name == part.after]
        code = told(before, out).get("code")
        if code:
            return f"{part.after} failed"
        if code is None:
            return f"{part.after} comes first"
    if part.after and not (out / RUNS / part.after / "checkpoints").is_dir():
        return f"the checkpoints of {part.after} are not here (they are not packed)"
    return None


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# One stretch


def stretch(every: list[Part], options: argparse.Namespace) -> None:
    """Work until the time is over or nothing is left that can begin."""
    until = time.monotonic() + 60 * options.minutes - PACKING
    running: list[Running] = []
    try:
        while True:
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                finish(each, options.out)
            if time.monotonic() > until:
                return
            while part := following(every, running, until, options):
                running.append(begin(part, options))
            if not running:
                return
            time.sleep(0.2)
    finally:
        for each in running:
            stop(each)
            say(f"{each.part.name}: stopped after {time.monotonic() - each.begun:.0f} s, to be done anew")


def following(
    every: list[Part], running: list[Running], until: float, options: argparse.Namespace
) -> Part | None:
    """The first part that can begin now and would be done in time."""
    left = until - time.monotonic()
    at_work = [each.part for each in running]
    open_parts = [part for part in every if part not in at_work and not told(part, options.out)]
    for part in open_parts:
        if lacks(part, every, options.out):
            continue
        if any(each.alone for each in at_work) or (part.alone and at_work):
            # What lies before it in importance is not overtaken by what must have the device for itself.
            return None
        if len(at_work) >= options.at_once:
            return None
        if part.seconds <= left or (options.smoke and left > 0):
            return part
    return None


def begin(part: Part, options: argparse.Namespace) -> Running:
    say(f"{part.name}: begun, should take {part.seconds:.0f} s")
    log = options.out / LOGS / f"{part.name}.log"
    log.parent.mkdir(exist_ok=True)
    cache = options.out / "cache"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(options.out / SITE), os.environ.get("PYTHONPATH", "")]),
        # What was compiled in a stretch that ended too early is there in the next one.
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as into:
        process = subprocess.Popen(
            [sys.executable, *part.words], cwd=ROOT, env=environment, stdout=into, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Running(part, process)


def finish(each: Running, out: Path) -> None:
    took, code = time.monotonic() - each.begun, each.process.returncode
    path = mark(each.part, out)
    path.parent.mkdir(exist_ok=True)
    kept = {
        "command": ["python", *each.part.words],
        "code": code,
        "seconds": round(took, 1),
        "expected": each.part.seconds,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    say(
        f"{each.part.name}: "
        + (
            f"done in {took:.0f} s"
            if code == 0
            else f"FAILED after {took:.0f} s: {last_line(each.part, out)}"
        )
    )


def last_line(part: Part, out: Path) -> str:
    lines = (out / LOGS / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def stop(each: Running) -> None:
    """The part and all that it began."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(each.process.pid, signal.SIGKILL)
    each.process.wait()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def summary(every: list[Part], options: argparse.Namespace) -> int:
    """Say what is there, what failed and what is left; 0 where all is there."""
    done = [part for part in every if told(part, options.out).get("code") == 0]
    failed = [part for part in every if told(part, options.out).get("code")]
    left = [part for part in every if not told(part, options.out)]
    print(f"\n{len(done)} of {len(every)} parts are there, packed in {options.out / PACKED}.")
    for part in failed:
        print(f"failed (again with --retry): {part.name}: {last_line(part, options.out)}")
    held = [(part, lacks(part, every, options.out)) for part in left]
    for part, why in held:
        if why and not why.endswith("comes first"):
            print(f"left out: {part.name}, for {why}")
    todo = [part for part, why in held if why is None or why.endswith("comes first")]
    if todo:
        minutes = sum(part.seconds for part in todo) / 60
        print(
            f"left: {', '.join(part.name for part in todo)}; about {minutes:.0f} minutes. Give the command again."
        )
    if not left and not failed and options.smoke:
        print("All of it runs here. These runs and figures are tiny, and belong nowhere.")
    elif not left and not failed:
        print(
            f"All is there. python -m benchmarks.gpu --place {options.out / PACKED} puts it where it belongs."
        )
    return int(bool(left or failed))


# Packages that are brought


def installed(wheels: Path, into: Path) -> None:
    """The wheels in a folder, for the parts alone; those that are there already stay."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"There is no wheel in {wheels}.")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--upgrade",
        "--target",
        str(into),
    ]
    if subprocess.run([*command, *map(str, found)]).returncode:
        sys.exit("The wheels could not be installed; what pip said is above.")


def site(folder: Path) -> None:
    """Let `there` see what was brought."""
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


if __name__ == "__main__":
    sys.exit(main())
