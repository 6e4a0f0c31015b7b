"""Does attribution keep to what it announces? `python -m benchmarks.attribution --save`.

`probes.attribute` says before its work how many passes, how long and how much memory it will take. Each method on each
model, and a what-if, in a process of its own: announced beside taken. Passes are counted by a hook, memory is the largest
that the process held. Some four minutes on two quiet cores. `--smoke` takes seconds and proves nothing. CPU only.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

try:
    import probes
    from attnres import Decoder, DecoderConfig
    from benchmarks import provenance
    from probes.attributed import METHODS
    from probes.budget import Estimate
    from probes.provenance import processor
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.attribution` ({error})."
    ) from error

RESULT = Path(__file__).parent / "results" / "attribution-cpu.md"
KINDS = {
    "PreNorm": {"residual": "prenorm"},
    "Full": {"residual": "full"},
    "Block": {"residual": "block", "layers_per_block": 4},
}
CONVERTED = "Llama, converted"
WHAT_IF = "what-if"
SMOKE = {"blocks": 2, "width": 16, "batch": 2, "context": 8, "steps": 2, "samples": 1}
COLUMNS = (
    "passes announced",
    "made",
    "seconds announced",
    "taken",
    "taken / announced",
    "GB announced",
    "held",
)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    lines = header(arguments, options)
    print(lines[-1], flush=True)
    rows, worst = [], 0.0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "probes", "transformers"])
    for model in options.models:
        for method in options.methods:
            # A process for each: the most that it held is that of this one alone.
            with ProcessPoolExecutor(1, context) as pool:
                told = pool.submit(measured, model, method, options).result()
            worst = max(worst, abs(told["taken"] / told["seconds"] - 1))
            rows.append(row(model, method, told))
            print(rows[-1], flush=True)
    lines += [
        "",
        "| model | method | " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
    ]
    lines += [*rows, "", f"The estimate was off by at most {worst:.0%}."]
    print(lines[-1])
    if options.save:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")
        print(f"Saved: {options.out}")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attribution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=[*KINDS, CONVERTED], default=[*KINDS, CONVERTED])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, WHAT_IF], default=[*METHODS, WHAT_IF])
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of integrated gradients")
    parser.add_argument("--samples", type=int, default=1, help="orders for Shapley values")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULT.name}")
    parser.add_argument("--out", type=Path, default=RESULT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def header(arguments: list[str] | None, options: argparse.Namespace) -> list[str]:
    return [
        "# Does attribution keep to what it announces?",
        "",
        f"`{provenance.command('attribution', arguments)}` at {provenance.commit()}, on {processor()}, "
        f"{options.threads} threads; torch {torch.__version__}, python {platform.python_version()}. {options.blocks} transformer "
        f"blocks, width {options.width}, {options.batch}×{options.context} tokens, float32; {options.steps} steps of integrated "
        f"gradients, {options.samples} order of Shapley values.",
    ]


def built(model: str, options: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"blocks": options.blocks, "width": options.width, "context": options.context}
    if model in KINDS:
        return Decoder(DecoderConfig(heads=4, kv_heads=2, **shape, **KINDS[model]))
    import transformers

    import attnres

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.context,
    )
    return attnres.convert(transformers.LlamaForCausalLM(config), residual="block", layers_per_block=4)


def measured(model: str, method: str, options: argparse.Namespace) -> dict:
    """In a process of its own: what was announced, and what became of it."""
    torch.set_num_threads(options.threads)
    made = built(model, options)
    passes, told = [], []

    def announce(estimate: Estimate) -> None:
        passes.clear()
        told.extend((estimate, time.perf_counter()))

    made.register_forward_pre_hook(lambda *_: passes.append(1))
    tokens = torch.randint(256, (2 * options.batch, options.context))
    probes.attribute(
        made,
        tokens[: options.batch],
        methods=["gradient" if method == WHAT_IF else method],
        what_if=tokens[options.batch :] if method == WHAT_IF else None,
        steps=options.steps,
        samples=options.samples,
        announce=announce,
    )
    estimate, begun = told
    return {
        "taken": time.perf_counter() - begun,
        "seconds": estimate.seconds,
        "passes": estimate.forwards + estimate.backwards,
        "made": len(passes),
        "bytes": estimate.bytes,
        "held": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def row(model: str, method: str, told: dict) -> str:
    cells = [
        f"{told['passes']:,}",
        f"{told['made']:,}",
        f"{told['seconds']:.1f}",
        f"{told['taken']:.1f}",
        f"{told['taken'] / told['seconds']:.2f}",
        f"{told['bytes'] / 1e9:.2f}",
        f"{told['held'] / 1e9:.2f}",
    ]
    return f"| {model} | {method} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
