"""Draw the figures of docs/sample-runs.md from the sample runs: `python sample_runs/figures.py [RUNS [INTO]]`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import app  # noqa: E402
import probes  # noqa: E402

DECODERS = ("prenorm", "deepnorm", "full", "block")
TWINS = ("prenorm-24", "block-24")
DEEP = ("deep-prenorm", "deep-block")
KIMI = ("kimi-prenorm", "kimi-block")
SCALE = 1.25  # pixels a point: sharp enough for a page, small enough for a repository


def main(runs: Path = HERE, into: Path = HERE.parent / "docs" / "images") -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name, chart in figures(runs).items():
        path = into / f"sample-{name}.png"
        chart.save(path, scale_factor=SCALE)
        print(path)


def figures(runs: Path) -> dict:
    """Name -> chart, each of what the runs recorded."""

    def plot(*names: str):
        return app.plot([probes.open_run(runs / name) for name in names])

    broken = probes.open_run(runs / "unhealthy")
    return {
        "loss": plot(*DECODERS).loss("val_loss"),
        "dilution": plot(*DECODERS).dilution("hidden_rms", scale="log"),
        "gradients": plot(*DECODERS).gradients(),
        "full": plot("full").depth_attention(),
        "block": plot("block").depth_attention(),
        "prenorm-share": plot("prenorm").depth_attention("mixing_share"),
        "full-share": plot("full").depth_attention("mixing_share"),
        "twins-dilution": plot(*TWINS).dilution("hidden_rms", scale="log"),
        "deep-dilution": plot(*DEEP).dilution("hidden_rms", scale="log"),
        "deep-gradients": plot(*DEEP).gradients(),
        "deep-block": plot("deep-block").depth_attention(),
        "kimi-dilution": plot(*KIMI).dilution("hidden_rms", scale="log"),
        "kimi-block": plot("kimi-block").depth_attention(),
        "unhealthy-loss": app.plot(broken).loss(scale="log"),
        "unhealthy-states": app.plot(broken).over_training("hidden_rms"),
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
