"""What the compiler makes of AttnRes: `python -m benchmarks.calls` counts the calls in compiled code.

For a token of generation, and for forward and backward of a training step, of PreNorm, Full and Block: fused kernels,
library calls (matrix products, attention), views and fresh buffers, with the MiB of the latter. No clock is read, so it
may run on a machine that does other things; it compiles for minutes. CPU only.
"""

import argparse
import re

import torch
from torch.nn import functional as F

try:
    from attnres import Decoder, DecoderConfig
    from attnres.cache import Cache
    from attnres.residual import AttnRes
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.calls` ({error})."
    ) from error

KINDS = {"PreNorm": {}, "Full": {"residual": "full"}, "Block": {"residual": "block", "layers_per_block": 3}}
CALLS = {
    "fused": r"\bcpp_fused\w*\(",
    "library": r"extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+[.\w]*\(",
    "views": r"reinterpret_tensor\(",
    "buffers": r"empty_strided\w*\(",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--residuals", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args(arguments)
    print("| | " + " | ".join(CALLS) + " | MiB |\n" + "|---" * (len(CALLS) + 2) + "|")
    for workload in options.workloads:
        for kind in options.residuals:
            for part, code in WORKLOADS[workload](options, kind).items():
                calls, size = counted(code)
                cells = [f"{part}, {kind}", *calls.values(), f"{size / 2**20:.1f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def counted(code: str) -> tuple[dict[str, int], int]:
    """How often compiled code calls each, and the bytes of its fresh buffers, taken as float32."""
    body = code[code.index("def call(") :]
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", body)
    elements = [torch.Size(int(d) for d in shape.split(",") if d.strip()).numel() for shape in shapes]
    return {name: len(re.findall(pattern, body)) for name, pattern in CALLS.items()}, 4 * sum(elements)


def decoder(options: argparse.Namespace, kind: str) -> Decoder:
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {"width": options.width, "blocks": options.blocks, "context": options.context}
    model = Decoder(DecoderConfig(**sizes, **KINDS[kind]))
    with torch.no_grad():
        for read in getattr(model.residual, "reads", ()):
            read.query.normal_(std=options.width**-0.5)
    return model


def generation(options: argparse.Namespace, kind: str) -> dict[str, str]:
    """The compiled code of one token, of one text."""
    from torch._inductor.utils import run_and_get_code

    model = decoder(options, kind).eval()
    step = torch.compile(lambda token, cache: model(token, cache)[:, -1], fullgraph=True)
    with torch.no_grad():
        queries = model.residual.queries() if isinstance(model.residual, AttnRes) else None
        cache = Cache(model.config, 1, options.context, model.embedding.weight, queries)
        _, (code,) = run_and_get_code(step, torch.zeros(1, 1, dtype=torch.long), cache)
    return {"token": code}


def training(options: argparse.Namespace, kind: str) -> dict[str, str]:
    """The compiled code of forward and backward of one batch."""
    from torch._inductor.utils import run_and_get_code

    model = decoder(options, kind)
    run = torch.compile(model, dynamic=False)
    tokens = torch.randint(256, (options.batch, options.context))

    def step() -> None:
        F.cross_entropy(run(tokens).flatten(0, 1), tokens.flatten()).backward()

    _, codes = run_and_get_code(step)
    return dict(zip(("forward", "backward"), codes, strict=True))


WORKLOADS = {"generation": generation, "training": training}


if __name__ == "__main__":
    main()
