"""What recording costs beside other ways to watch a training: `python -m benchmarks.overhead --out FILE`.

One training step of a decoder, watched by each contender, each on a model of its own. Every round takes all of them
once, in an order drawn anew, and a ratio to the unwatched step is taken within the round, so that what else the
machine does falls on all alike (a rival whose step takes three times as long sits out all but the first five rounds);
"none, again" shows what the machine's noise alone makes of nothing. Then
`probes.bench` compares recorded with unrecorded steps of one and the same model, and amortises them at the default
schedule; with `--attribution` once more without live attribution, which shows what that adds to a step with matrices. wandb (offline) and TorchInstruments take part where they are installed:

    pip install wandb torchinstruments

The defaults take some minutes on a CPU; `--modes compiled` compiles first, for minutes more. On a GPU:

    python -m benchmarks.overhead --device cuda --dtype bfloat16 --width 1024 --heads 8 --batch 8 --context 2048 \\
        --modes eager compiled reduce-overhead --check-sync --out overhead-1024.json

`--check-sync` runs recorded steps under `torch.cuda.set_sync_debug_mode("error")`; with `--modes reduce-overhead` the
notes count what kept the compiler from CUDA graphs. `--profile` says which kernels take the time of an unwatched step, and
of ours. `--smoke` takes seconds and proves nothing.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch

try:
    import probes
    from benchmarks import profiles, provenance
    from benchmarks.contenders import OWN, WAYS, compiled, decoder, loss_of, nothing, ours, tokens_for
    from probes.benching import machine
    from probes.cost import Cost, Spread
    from probes.edge_taps import EdgeTaps
    from probes.provenance import processor
    from probes.stopwatch import timed
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.overhead` ({error})."
    ) from error

SMOKE = {"pairs": 2, "blocks": 2, "width": 32, "batch": 1, "context": 16}
BASE, AGAIN = "none", "none, again"
# Whose step takes so many times the unwatched one takes part in the first rounds alone: its quartiles lie close enough.
SLOW, FEW = 3, 5
REMARKS = "\n# Beside other tools\n"


@dataclass
class Contender:
    """One way to watch a training step, and the seconds of its steps."""

    name: str
    step: Callable[[], object]
    rounds: int
    seconds: list[float] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    report = header(arguments, options)
    say(f"{report['command']} at {report['commit']}: {report['hardware']}, {report['versions']}")
    for mode in options.modes:
        report["modes"][mode] = watched(mode, options)
        say(table(mode, report["modes"][mode]))
        for residual in options.residuals:
            for without in (False, True) if options.attribution else (False,):
                with no_attribution() if without else contextlib.nullcontext():
                    cost = own(mode, residual, options)
                name = f"{residual}, without live attribution" if without else residual
                report["bench"].append({"mode": mode, "residual": name, "printed": str(cost)} | figures(cost))
                say(f"\n{name} residual\n{cost}")
    report["seconds"] = round(time.monotonic() - started)
    say(f"\nall of it took {report['seconds']} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        written = options.out.with_suffix(".md")
        old = written.read_text(encoding="utf-8") if written.exists() else ""
        _, heading, remarks = old.partition(REMARKS)  # what people wrote below the tables stays
        written.write_text(page(report) + heading + remarks, encoding="utf-8")


def say(text: str) -> None:
    print(text, flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4, help="half as many of keys and values")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    modes = ("eager", "compiled", "reduce-overhead")
    parser.add_argument("--modes", nargs="+", choices=modes, default=["eager"])
    parser.add_argument("--contenders", nargs="*", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument(
        "--residuals",
        nargs="*",
        choices=("prenorm", "full", "block"),
        default=["prenorm", "block"],
        help="models of which recorded and unrecorded steps are compared; prenorm has no depth weights to record",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--attribution", action="store_true", help="measure recorded steps without live attribution as well"
    )
    parser.add_argument("--profile", action="store_true", help="say which kernels take the time of a step")
    parser.add_argument("--check-sync", action="store_true", help="on CUDA: recorded steps must not wait")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a page beside it")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two rounds")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


# Measuring


def watched(mode: str, options: argparse.Namespace) -> dict:
    """Seconds of every contender's steps in one mode, and notes on what could not be had."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = 64  # each contender has a model of its own, all of one class
    entries = [(BASE, nothing), (AGAIN, nothing), *(WAYS[name] for name in options.contenders)]
    contenders, notes, base = [], [], 0.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for place, (name, way) in enumerate(entries):
            try:
                (folder / str(place)).mkdir()
                with quiet():
                    step = stack.enter_context(way(mode, folder / str(place), options))
                    warm = timed([step] * 3, torch.device(options.device))[-1]
            except Exception as error:
                if way in OWN:
                    raise
                kind = "is not installed" if isinstance(error, ImportError) else "failed"
                notes.append(f"{name} {kind}: {str(error).strip().splitlines()[0]}")
                continue
            base = base or warm
            rounds = min(FEW, options.pairs) if warm > SLOW * base else options.pairs
            contenders.append(Contender(name, step, rounds))
            if way is ours and options.check_sync:
                notes.append(sync_check(step, options))
        with quiet():  # a recording that begins makes graphs that were built before it be built anew
            timed([each.step for each in contenders] * 3, torch.device(options.device))
        order = random.Random(0)
        line = []
        for turn in range(options.pairs):
            present = [each for each in contenders if turn < each.rounds]
            line += order.sample(present, len(present))
        with quiet():
            times = timed([each.step for each in line], torch.device(options.device))
        for each, seconds in zip(line, times, strict=True):
            each.seconds.append(seconds)
        where = {}
        if options.profile:
            steps = {
                each.name: each.step for each in contenders if each.name in (BASE, WAYS["depthscope"][0])
            }
            where = {name: profiles.profiled(step, options.device) for name, step in steps.items()}
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    if mode == "reduce-overhead":
        notes.append(f"graphs that could not be CUDA graphs: {skipped}")
    rows = [{"name": c.name, "seconds": c.seconds} for c in contenders]
    return {"rows": rows, "notes": notes, "profile": where}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Rivals greet on both streams; a benchmark's table should not be lost among it."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def sync_check(step: Callable, options: argparse.Namespace) -> str:
    """Three recorded steps in which waiting for the device is an error."""
    if not options.device.startswith("cuda"):
        return "sync check: only on CUDA"
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(
        record.getMessage()
    )  # a probe that fails warns and lets training be
    logging.getLogger("depthscope").addHandler(listener)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    except RuntimeError as error:
        said.append(str(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        logging.getLogger("depthscope").removeHandler(listener)
    if said:
        return f"sync check: a recorded step waits for the device: {said[0].splitlines()[0]}"
    return "sync check: three recorded steps, none waited for the device"


def own(mode: str, residual: str, options: argparse.Namespace) -> Cost:
    """probes.bench at the default schedule."""
    model, tokens = decoder(residual, options), tokens_for(options)
    torch._dynamo.reset()
    run = compiled(model, mode)
    return probes.bench(run, tokens, loss=lambda logits: loss_of(logits, tokens), pairs=options.pairs)


@contextlib.contextmanager
def no_attribution() -> Iterator[None]:
    """Recorders that begin here leave live attribution out."""
    with contextlib.ExitStack() as stack:
        for name in ("attach", "read", "output"):
            stack.enter_context(mock.patch.object(EdgeTaps, name, lambda self, *given: None))
        yield


# Reporting


def header(arguments: list[str] | None, options: argparse.Namespace) -> dict:
    return {
        "command": provenance.command("overhead", arguments),
        "commit": provenance.commit(),
        "hardware": f"{machine(torch.device(options.device))}, {processor()}",
        "versions": {
            name: version
            for name in ("torch", "wandb", "torchinstruments", "numpy")
            if (version := installed(name))
        }
        | {"python": platform.python_version()},
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "modes": {},
        "bench": [],
    }


def installed(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def shares(row: dict, base: dict) -> Spread:
    # Whoever missed rounds missed the last ones.
    return Spread.of([mine / its - 1 for mine, its in zip(row["seconds"], base["seconds"], strict=False)])


def table(mode: str, measured: dict) -> str:
    base = measured["rows"][0]
    step = Spread.of(base["seconds"])
    lines = [
        f"\n{mode}: {len(base['seconds'])} rounds; an unwatched step takes {1e3 * step.median:.4g} ms "
        f"(quartiles {1e3 * step.low:.4g} – {1e3 * step.high:.4g})\n",
        "| watched by | adds to a step, median | quartiles | rounds |",
        "|---|---|---|---|",
    ]
    for row in measured["rows"][1:]:
        low, middle, high = (100 * share for share in shares(row, base))
        lines.append(
            f"| {row['name']} | {middle:+.2f} % | {low:+.2f} – {high:+.2f} % | {len(row['seconds'])} |"
        )
    more = [f"\n{note}" for note in measured["notes"]]
    if measured["profile"]:
        more.append(f"\nWhere a step's time goes:\n\n{profiles.printed(measured['profile'])}\n")
    return "\n".join([*lines, *more])


def figures(cost: Cost) -> dict:
    spreads = {name: getattr(cost, name)._asdict() for name in ("step", "vectors", "matrices", "amortised")}
    return asdict(cost) | {"every": str(cost.every), "matrices_every": str(cost.matrices_every)} | spreads


def page(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    shape = "{blocks} transformer blocks, width {width}, {batch}×{context} tokens, {dtype}".format(
        **report["options"]
    )
    parts = [
        "# What recording costs\n",
        f"`{report['command']}` at {report['commit']}, on {report['hardware']}; {versions}. {shape}, AdamW.",
        *(table(mode, measured) for mode, measured in report["modes"].items()),
        "\nRecorded and unrecorded steps of one model (`probes.bench`):\n",
        *(f"{each['residual']} residual:\n\n```\n{each['printed']}\n```\n" for each in report["bench"]),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
