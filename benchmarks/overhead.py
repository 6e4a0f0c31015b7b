"""What recording costs beside other ways to watch a training: `python -m benchmarks.overhead --out FILE`.

One training step of a decoder, watched by each contender, each on a model of its own. Every round takes all of them
once, in an order drawn anew, and a ratio to the unwatched step is taken within the round, so that what else the
machine does falls on all alike (a rival whose step takes three times as long sits out all but the first five rounds);
"none, again" shows what the machine's noise alone makes of nothing. Then
`probes.bench` compares recorded with unrecorded steps of one and the same model, and amortises them at the default
schedule. wandb (offline) and TorchInstruments take part where they are installed:

    pip install wandb torchinstruments

The defaults take some minutes on a CPU; `--modes compiled` compiles first, for minutes more. On a GPU:

    python -m benchmarks.overhead --device cuda --dtype bfloat16 --width 1024 --batch 8 --context 2048 \\
        --modes eager compiled reduce-overhead --check-sync --out overhead-1024.json

`--check-sync` runs recorded steps under `torch.cuda.set_sync_debug_mode("error")`; with `--modes reduce-overhead` the
notes count what kept the compiler from CUDA graphs. `--smoke` takes seconds and proves nothing.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import probes
    from attnres import Decoder, DecoderConfig
    from probes.benching import machine
    from probes.cost import Cost, Spread
    from probes.stopwatch import timed
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.overhead` ({error})."
    ) from error

SMOKE = {"pairs": 2, "blocks": 2, "width": 32, "batch": 1, "context": 16}
BASE, AGAIN = "none", "none, again"
NEVER = range(1)  # step 0 alone
# Whose step takes so many times the unwatched one takes part in the first rounds alone: its quartiles lie close enough.
SLOW, FEW = 3, 5


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
            cost = own(mode, residual, options)
            report["bench"].append({"mode": mode, "residual": residual, "printed": str(cost)} | figures(cost))
            say(f"\n{residual} residual\n{cost}")
    report["seconds"] = round(time.monotonic() - started)
    say(f"\nall of it took {report['seconds']} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(page(report), encoding="utf-8")


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
    parser.add_argument("--check-sync", action="store_true", help="on CUDA: recorded steps must not wait")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, and a page beside it")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two rounds")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


# The contenders


def decoder(residual: str, options: argparse.Namespace) -> Decoder:
    torch.manual_seed(0)
    more = {"layers_per_block": 4} if residual == "block" else {}
    config = DecoderConfig(
        width=options.width, blocks=options.blocks, context=options.context, residual=residual, **more
    )
    return Decoder(config).to(options.device, getattr(torch, options.dtype))


def tokens_for(options: argparse.Namespace) -> Tensor:
    return torch.randint(256, (options.batch, options.context), device=options.device)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def compiled(model: nn.Module, mode: str, whole: bool = True) -> nn.Module:
    """`whole` asks for one graph, which hooks that read numbers back do not leave."""
    if mode == "eager":
        return model
    return torch.compile(
        model, fullgraph=whole, dynamic=False, mode="reduce-overhead" if mode == "reduce-overhead" else None
    )


def stepper(run: nn.Module, optimizer, options: argparse.Namespace, after: Callable = lambda loss: None):
    """A training step; `after(loss)` is what a contender does between the backward pass and the update."""
    tokens = tokens_for(options)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(run(tokens), tokens)
        loss.backward()
        after(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


@contextlib.contextmanager
def nothing(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    model = decoder("prenorm", options)
    yield stepper(compiled(model, mode), adamw(model), options)


@contextlib.contextmanager
def ours(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """Vectors at every step."""
    model = decoder("prenorm", options)
    optimizer = adamw(model)
    with probes.record(model, folder / "run", optimizer=optimizer, every=1, matrices_every=NEVER):
        yield stepper(compiled(model, mode), optimizer, options)


@contextlib.contextmanager
def item_hooks(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """The same numbers by hooks that read each one back, as they are commonly written."""
    model = decoder("prenorm", options)
    seen: dict[str, float] = {}

    def watch(name: str, x: Tensor) -> None:
        seen[name] = x.float().pow(2).mean().sqrt().item()

    def hook(name: str):
        def after(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            for place, tensor in (("state", args[0]), ("output", x)):
                watch(f"{name} {place}", tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda g, place=place: watch(f"{name} {place} gradient", g))

        return after

    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            module.register_forward_hook(hook(name))

    def norms(loss: Tensor) -> None:
        for name, p in model.named_parameters():
            seen[name] = p.grad.norm().item()

    yield stepper(compiled(model, mode, whole=False), adamw(model), options, norms)
    if len(seen) < 4 * 2 * options.blocks:
        raise RuntimeError(f"the hooks saw {len(seen)} numbers only")


@contextlib.contextmanager
def wandb_watch(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """wandb.watch(log="all", log_freq=1), offline."""
    import wandb

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    model = decoder("prenorm", options)
    with wandb.init(project="overhead", mode="offline", dir=str(folder)) as run:
        run.watch(model, log="all", log_freq=1)
        yield stepper(
            compiled(model, mode, whole=False),
            adamw(model),
            options,
            lambda loss: run.log({"loss": loss.item()}),
        )


@contextlib.contextmanager
def torchinstruments(mode: str, folder: Path, options: argparse.Namespace) -> Iterator[Callable]:
    """An observer that samples every forward."""
    from torchinstruments import inject_observer, remove_observer
    from torchinstruments.sampling import AlwaysSampler

    model = decoder("prenorm", options)
    inject_observer(model, sampler=AlwaysSampler(), output_dir=folder / "stats")
    try:
        yield stepper(compiled(model, mode, whole=False), adamw(model), options)
    finally:
        remove_observer(model)


WAYS = {
    "depthscope": ("depthscope, vectors at every step", ours),
    "item": ("hooks with .item()", item_hooks),
    "wandb": ('wandb.watch(log="all", log_freq=1)', wandb_watch),
    "torchinstruments": ("TorchInstruments, every forward", torchinstruments),
}
OWN = (nothing, ours)


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
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    if mode == "reduce-overhead":
        notes.append(f"graphs that could not be CUDA graphs: {skipped}")
    return {"rows": [{"name": c.name, "seconds": c.seconds} for c in contenders], "notes": notes}


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


# Reporting


def header(arguments: list[str] | None, options: argparse.Namespace) -> dict:
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", "benchmarks.overhead", *given]),
        "commit": commit(),
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


def commit() -> str:
    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", with changes" if changed else "")


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


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
    return "\n".join([*lines, *(f"\n{note}" for note in measured["notes"])])


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
