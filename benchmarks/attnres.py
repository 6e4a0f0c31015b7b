"""What AttnRes costs: `python -m benchmarks.attnres` prints the time of every contender over PreNorm's.

Each round runs every contender once, in turning order, and a ratio is taken within a round, so that what else the
machine does falls on all alike. Columns: the median ratio and its quartiles over the rounds, the median time, the
seconds that the first call took (compilation and all), and the most memory that one call held at a time beyond what
was held before it. PyPI's attn-res takes part in eager training where it is installed, and its time over ours is
printed too. `--save NAME` keeps every table in benchmarks/results/NAME.json and .md, beside those that are there of
other workloads, and with `--profile` what one call of each contender spends its time on. A schedule may be the name of a
package with a fused kernel, `fla` or `liger_kernel`, where that is installed. `--smoke` takes seconds and proves nothing.
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

try:
    from attnres import Decoder, DecoderConfig, fused, generate
    from attnres.fused import fused_read
    from attnres.schedules import SCHEDULES
    from benchmarks import profiles, provenance
    from probes.provenance import processor
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.attnres` ({error})."
    ) from error

RESULTS = Path(__file__).parent / "results"
REMARKS = "\n# Where the time goes\n"
SMOKE = {"rounds": 2, "blocks": 2, "width": 32, "batch": 1, "context": 16, "tokens": 4, "heads": 2}


@dataclass
class Contender:
    """One thing to time, and what its rounds took."""

    name: str
    call: Callable[[], object]
    first: float = 0.0
    peak: float = 0.0
    profile: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads", flush=True)
    for mode in options.modes:
        for name, contenders in (("training step", training), ("generation", generation)):
            if name.split()[0] in options.workloads:
                title = f"{mode} {name}" + (f", {options.label}" if options.label else "")
                found = measured(list(contenders(options, mode == "compiled")), options)
                table, where = tabled(found), {each.name: each.profile for each in found if each.profile}
                print(f"\n{title}, {options.rounds} rounds\n{printed(table)}", flush=True)
                if where:
                    print(f"\n{profiles.printed(where)}", flush=True)
                if options.save:
                    save(title, table, where, options, arguments)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attnres", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4, help="half as many of keys and values")
    parser.add_argument("--layers-per-block", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="to generate, after one of prompt")
    parser.add_argument("--texts", type=int, default=1, help="to generate at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kinds", nargs="+", choices=("full", "block"), default=["full", "block"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument(
        "--workloads", nargs="+", choices=("training", "generation"), default=["training", "generation"]
    )
    parser.add_argument(
        "--schedules", nargs="+", choices=(*SCHEDULES, *fused.PACKAGES, "fused", "auto"), default=["auto"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME", help="keep the tables in benchmarks/results")
    parser.add_argument("--results", type=Path, help="another folder for them")
    parser.add_argument("--profile", action="store_true", help="say which kernels take the time of one call")
    parser.add_argument("--label", help="what sets these tables apart from others of the same workload")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two rounds")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def models(options: argparse.Namespace) -> Iterator[tuple[str, Decoder]]:
    """PreNorm first, then Full and Block in each schedule."""
    sizes = {
        "width": options.width,
        "blocks": options.blocks,
        "context": max(options.context, options.tokens + 1),
    }
    sizes |= {"heads": options.heads, "kv_heads": max(1, options.heads // 2)}
    kinds = {"full": {}, "block": {"layers_per_block": options.layers_per_block}}
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    torch.manual_seed(0)
    yield "PreNorm", Decoder(DecoderConfig(**sizes)).to(**place)
    for kind in options.kinds:
        for schedule in options.schedules:
            if schedule in fused.PACKAGES and not only(schedule, options):
                print(
                    f"{schedule} is not installed here or not right on {options.device}, so it is not in the tables."
                )
                continue
            model = Decoder(DecoderConfig(**sizes, residual=kind, **kinds[kind])).to(**place)
            with torch.no_grad():
                for read in model.residual.reads:
                    read.query.normal_(std=options.width**-0.5)
            model.residual.schedule = "fused" if schedule in fused.PACKAGES else schedule
            if schedule == "auto":
                fuses = fused_read([torch.empty(1, 1, options.width, **place)]) is not None
                schedule = "fused" if fuses else "no_stack"
            yield f"{kind.capitalize()}, {schedule}", model


def training(options: argparse.Namespace, compiled: bool) -> Iterator[Contender]:
    """Forward, backward and AdamW on 4×256 tokens, or what the options say."""
    tokens = torch.randint(256, (options.batch, options.context), device=options.device)
    for name, model in [*models(options), *([] if compiled else others(options))]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        run = torch.compile(model, dynamic=False) if compiled else model

        def step(name=name, run=run, optimizer=optimizer):
            with through(name, options):
                logits = run(tokens)
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        yield Contender(name, step)


def generation(options: argparse.Namespace, compiled: bool) -> Iterator[Contender]:
    """Greedy tokens of one text, or of `--texts`, after a prompt of one token."""
    prompt = torch.zeros(options.texts, 1, dtype=torch.long, device=options.device)
    for name, model in models(options):

        def continued(name=name, model=model):
            with through(name, options):
                return generate(model, prompt, options.tokens, compiled=compiled)

        yield Contender(name, continued)


def only(package: str, options: argparse.Namespace) -> list[tuple[str, fused.Read]]:
    """That package's fused read, where it is installed and right on this device."""
    if not options.device.startswith(fused.DEVICES):
        return []
    device = torch.empty(0, device=options.device).device
    return [(name, read) for name, read in fused._checked(device) if name == package]


@contextlib.contextmanager
def through(name: str, options: argparse.Namespace) -> Iterator[None]:
    """Where a contender is named after a package, its reads go through that one's kernel, whatever else is installed."""
    package = name.rpartition(", ")[2]
    if package not in fused.PACKAGES:
        yield
        return
    chosen = only(package, options)
    with mock.patch.object(fused, "_checked", lambda device: chosen):
        yield


def others(options: argparse.Namespace) -> Iterator[tuple[str, torch.nn.Module]]:
    """PyPI's attn-res at the same sizes. Its last state is a plain sum: it has no final read."""
    try:
        from importlib.metadata import version

        from attn_res import AttnResMode, AttnResTransformer, TransformerConfig
    except ImportError:
        print("attn-res is not installed, so it is not in the tables (pip install attn-res==0.1.0).")
        return
    if options.dtype != "float32":
        print("attn-res keeps its positions as complex numbers, so it is in tables of float32 alone.")
        return
    layers = 2 * options.blocks
    sizes = {"d_model": options.width, "n_layers": layers, "n_heads": options.heads, "vocab_size": 256}
    sizes |= {"n_blocks": max(1, layers // options.layers_per_block), "max_seq_len": options.context}
    for mode in (AttnResMode.NONE, AttnResMode.FULL, AttnResMode.BLOCK):
        model = AttnResTransformer(TransformerConfig(**sizes, attn_res_mode=mode))
        name = f"attn-res {version('attn-res')} {mode.value}"
        yield name, model.to(options.device)


def measured(contenders: list[Contender], options: argparse.Namespace) -> list[Contender]:
    """The first call and the memory of each, then rounds of all."""
    for each in contenders:
        each.first = seconds(each.call, options)
        each.call()
        each.peak = peak_memory(each.call, options)
    for turn in range(options.rounds):
        start = turn % len(contenders)
        for each in contenders[start:] + contenders[:start]:
            each.seconds.append(seconds(each.call, options))
    if options.profile:
        for each in contenders:
            each.profile = profiles.profiled(each.call, options.device)
    return contenders


def seconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def peak_memory(call: Callable[[], object], options: argparse.Namespace) -> float:
    """The most MiB that the allocator handed out during the call, beyond what it had before."""
    if options.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # The allocator's bytes are counted from the profile's start.
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / 2**20


def tabled(contenders: list[Contender]) -> list[dict]:
    """A row for each contender, and one for each of attn-res' over ours of the same kind."""
    rows = [row(each, contenders[0]) for each in contenders]
    for other in contenders:
        package, _, kind = other.name.rpartition(" ")
        for ours in contenders:
            if package.startswith("attn-res") and ours.name.lower().startswith(f"{kind},"):
                rows.append(row(other, ours, name=f"{other.name} over {ours.name}"))
    return rows


def row(each: Contender, base: Contender, name: str | None = None) -> dict:
    ratios = [mine / theirs for mine, theirs in zip(each.seconds, base.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "name": name or each.name,
        "over": base.name,
        "ratio": middle,
        "quartiles": [low, high],
        "milliseconds": 1e3 * statistics.median(each.seconds),
        "first call seconds": each.first,
        "peak MiB": each.peak,
    }


def printed(table: list[dict]) -> str:
    """The table in Markdown."""
    lines = ["| | ratio | quartiles | ms | first call, s | peak MiB |", "|---|---|---|---|---|---|"]
    for each in table:
        low, high = each["quartiles"]
        lines.append(
            f"| {each['name']} | {each['ratio']:.3f} | {low:.3f} – {high:.3f} | {each['milliseconds']:.1f} | "
            f"{each['first call seconds']:.1f} | {each['peak MiB']:.1f} |"
        )
    return "\n".join(lines)


def save(
    title: str,
    table: list[dict],
    where: dict[str, list[dict]],
    options: argparse.Namespace,
    arguments: list[str] | None,
) -> None:
    """Put the table beside the others of that name, in JSON and in Markdown."""
    path = (options.results or RESULTS) / f"{options.save}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[title] = {
        "command": provenance.command("attnres", arguments),
        "commit": provenance.commit(),
        "machine": machine(options),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "rounds": options.rounds,
        "table": table,
    } | ({"profile": where} if where else {})
    path.write_text(json.dumps(kept, indent=1) + "\n")
    parts = [f"# {options.save}: time over PreNorm's in the same rounds"]
    for name, each in kept.items():
        parts.append(
            f"## {name}\n\n    {each['command']}\n\nCommit {each['commit']}; {each['machine']}; "
            f"{each['versions']}; {each['rounds']} rounds.\n\n{printed(each['table'])}"
        )
        if "profile" in each:
            parts.append(f"One call of each:\n\n{profiles.printed(each['profile'])}")
    page = path.with_suffix(".md")
    # What somebody has written below the tables stays.
    _, heading, written = page.read_text().partition(REMARKS) if page.exists() else ("", "", "")
    page.write_text("\n\n".join(parts) + "\n" + heading + written)


def machine(options: argparse.Namespace) -> str:
    if options.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()}, {options.threads} threads"


if __name__ == "__main__":
    main()
