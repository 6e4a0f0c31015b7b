"""What `benchmarks/gpu.py` does, part by part, the most important first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

RUNS, RESULTS = "runs", "results"

SHAPE = "--heads 8 --dtype bfloat16 --batch 8 --context 2048"
WIDE = "--blocks 24 --layers-per-block 6 --dtype bfloat16 --batch 4 --context 2048"
SMOKE = 30
"""Seconds of a tiny part, at most, on two cores."""
LARGER = (
    "attnres, 32 texts, width 2048",
    "overhead, compiled",
    "attnres, width 1024",
    "overhead, CUDA graphs",
    "attnres, Full, width 1024",
)
EARLY = 200
"""The step of the checkpoint that is attributed besides the last one."""


@dataclass(frozen=True)
class Part:
    """One process. `seconds` is what it should take on an H200 (for recordings what benchmarks/expected.py prints, for the
    others a guess from compile times on a CPU and the arithmetic of a step); `alone`: its times count, so nothing else may
    run; `after`: the part whose files it needs; `needs`: packages, where one of "one|other" will do."""

    name: str
    words: tuple[str, ...]
    seconds: float
    alone: bool = False
    after: str | None = None
    needs: tuple[str, ...] = ()


def parts(folder: Path, device: str, text: Path | None = None, smoke: bool = False) -> list[Part]:
    """All there is to do on that device, its files below `folder`."""
    given = ["--text", str(text)] if text else []
    every = [
        *_recordings(folder, device, given, smoke),
        *_attributions(folder, device, text, smoke),
        *_costs(folder, device, smoke),
    ]
    if not smoke:
        return every
    # On a CPU a compiler takes minutes for what differs in size alone.
    every = [part for part in every if device != "cpu" or part.name not in LARGER]
    return [replace(part, seconds=SMOKE) for part in every]


def _recordings(folder: Path, device: str, given: Sequence[str], smoke: bool) -> list[Part]:
    seconds = {
        "prenorm": 85, "full": 205, "block": 112, "deepnorm": 85, "unhealthy": 31, "deep-block": 85, "deep-prenorm": 52,
        "block-killed": 40, "kimi-block": 90, "kimi-prenorm": 80,
    }  # fmt: skip
    few = ["--steps", "3"] if smoke else []
    names = ("full", "unhealthy", "kimi-block") if smoke else seconds
    return [
        Part(
            name,
            (
                "sample_runs/record.py", "--device", device, "--only", name, "--into", str(folder / RUNS),
                *(["--checkpoint-every", "2" if smoke else str(EARLY)] if name in ("prenorm", "full", "block") else []),
                *given, *few,
            ),
            seconds[name],
            needs=("transformers",) if name.startswith("kimi") else (),
        )
        for name in names
    ]  # fmt: skip


def _attributions(folder: Path, device: str, text: Path | None, smoke: bool) -> list[Part]:
    def part(name: str, run: str, seconds: float, *more: str) -> Part:
        command = ["-m", "app.cli", "attribute", str(folder / RUNS / run), "--device", device, *more]
        command += ["--data", str(text)] if text else []
        command += ["--sequences", "2", "--context", "16"] if smoke else ["--sequences", "16", "--what-if"]
        return Part(name, tuple(command), seconds, after=run, needs=("click", "pandas"))

    early = folder / RUNS / "full" / "checkpoints" / f"{EARLY:012d}.safetensors"
    if smoke:
        return [part("attribution of full", "full", 10, "--methods", "gradient,removal")]
    return [
        part("attribution of block", "block", 45),
        part("attribution of full", "full", 120),
        part("attribution of prenorm", "prenorm", 60),
        part("attribution of full, early", "full", 120, "--checkpoint", str(early)),
    ]


def _costs(folder: Path, device: str, smoke: bool) -> list[Part]:
    kind = "cpu" if smoke else device.partition(":")[0]
    tiny = ["--smoke"] if smoke else []

    def overhead(name: str, seconds: float, words: str) -> Part:
        out = folder / RESULTS / f"overhead-{kind}-{name}.json"
        command = [
            "-m",
            "benchmarks.overhead",
            "--device",
            device,
            "--width",
            "1024",
            *SHAPE.split(),
            *words.split(),
        ]
        return Part(
            f"overhead, {name}", (*command, "--profile", "--out", str(out), *tiny), seconds, alone=True
        )

    def attnres(name: str, seconds: float, words: str, needs: tuple[str, ...] = ()) -> Part:
        command = [
            "-m",
            "benchmarks.attnres",
            "--device",
            device,
            *WIDE.split(),
            *words.split(),
            "--label",
            name,
        ]
        command += ["--profile", "--save", f"attnres-{kind}", "--results", str(folder / RESULTS), *tiny]
        return Part(f"attnres, {name}", tuple(command), seconds, alone=True, needs=needs)

    training = "--workloads training --modes compiled"
    # A text needs no longer context than its tokens.
    generation = "--workloads generation --modes compiled --kinds block --context 256"
    return [
        Part("mixing", ("-m", "benchmarks.mixing", "--out", str(folder / RESULTS / f"mixing-{kind}.md"), *tiny), 30),
        overhead(
            "eager", 100,
            "--modes eager --check-sync --attribution --residuals prenorm full block",
        ),
        attnres("width 2048", 240, f"{training} --kinds block --width 2048 --heads 16"),
        attnres("32 texts, width 2048", 130, f"{generation} --texts 32 --width 2048 --heads 16"),
        attnres("1 text, width 2048", 130, f"{generation} --texts 1 --width 2048 --heads 16"),
        overhead("compiled", 200, "--modes compiled --check-sync --contenders depthscope --residuals block"),
        attnres("width 1024", 210, f"{training} --kinds block --width 1024 --heads 8"),
        attnres(
            "fused kernels, width 1024", 90,
            "--workloads training --modes eager --schedules no_stack fla liger_kernel --width 1024 --heads 8",
            needs=("fla|liger_kernel",),
        ),
        overhead("CUDA graphs", 120, "--modes reduce-overhead --check-sync --contenders depthscope --residuals"),
        attnres("Full, width 1024", 400, f"{training} --kinds full --width 1024 --heads 8"),
    ]  # fmt: skip
