"""`depthscope demo`: three small models learn side by side on this machine, and the dashboard watches them grow.

Two processes: the training (reniced, so that the page stays quick) and the dashboard. This one starts both, waits,
and says how to come back.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import click

from app.places import Here
from app.server import HOST, free, open_browser

ELSEWHERE = "The demo records on this machine: give --runs a folder here."
SAMPLE_RUNS = Path(__file__).resolve().parent.parent / "sample_runs"

# About three minutes for the three on two CPU cores.
SHAPE = {"width": 128, "blocks": 12, "heads": 4, "kv_heads": 2, "context": 128}
BATCH = 4
BLOCK_LAYERS = 3  # eight depth blocks
TOKENS_EVERY = 20  # steps between snapshots of the tokens of two sequences


@click.command()
@click.option("--runs", type=Here(ELSEWHERE), help="Folder for the three runs  [default: runs/demo-<time>]")
@click.option(
    "--port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Local port to serve on."
)
@click.option("--serve/--no-serve", default=True, help="Open the dashboard, or only train and record.")
@click.option("--no-browser", is_flag=True, help="Serve the dashboard without opening a browser.")
@click.option(
    "--steps", default=160, show_default=True, type=click.IntRange(1), help="Training steps of each model."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="File or folder to learn  [default: Python's own library]"
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    help="Save each model after so many steps and at the end, for depthscope attribute  [default: never]",
)
def demo(
    runs: Path | None,
    port: int,
    serve: bool,
    no_browser: bool,
    steps: int,
    text: Path | None,
    checkpoint_every: int | None,
) -> None:
    """Train a PreNorm, a Full AttnRes and a Block AttnRes model in turn, and watch them in the dashboard."""
    runs = runs or Path("runs") / f"demo-{datetime.now():%Y-%m-%d-%H%M%S}"
    if serve and not free(port):
        raise click.ClickException(
            f"Port {port} is in use: choose another with --port (or PORT=… make demo)."
        )
    if not serve:
        train_three(runs, steps, text, checkpoint_every)
        return
    _supervise(runs, port, not no_browser, steps, text, checkpoint_every)


def train_three(runs: Path, steps: int, text: Path | None, checkpoint_every: int | None = None) -> None:
    """Train and record the three models of equal size into `runs`, a step of each in turn."""
    try:
        from app.training import Corpus, DecoderConfig, RecordedTraining, Schedule, TrainingConfig, in_turn
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f'Training needs {error.name}, and only the viewer is installed: pip install "depthscope[probes]".'
        ) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    from probes import RunError
    from probes.manifest import MANIFEST

    kinds = {"prenorm": {}, "full": {}, "block": {"layers_per_block": BLOCK_LAYERS}}
    for kind in kinds:
        if (runs / kind / MANIFEST).exists():
            raise click.ClickException(f"{runs / kind} already holds a run: give another folder with --runs.")
    try:
        corpus = Corpus.from_path(text) if text else Corpus.standard_library()
        config = TrainingConfig(steps=steps, batch=BATCH, context=SHAPE["context"])
        trainings = [
            RecordedTraining(
                runs / kind,
                DecoderConfig(residual=kind, **SHAPE, **extra),
                config,
                corpus,
                Schedule(
                    tokens_every=None if kind == "prenorm" else TOKENS_EVERY,
                    checkpoint_every=checkpoint_every,
                ),
                ["demo"],
            )
            for kind, extra in kinds.items()
        ]
    except (ValueError, RunError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(
        f"Three models of equal size learn {corpus.name}, {steps} steps each; recording to {runs}.", err=True
    )
    _leave_a_core()
    try:
        in_turn(trainings)
    except RunError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\nStopped; what was recorded stays.", err=True)


def _leave_a_core() -> None:
    """One core is for the dashboard: threads that wait for each other crawl when one of them has to share."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def _supervise(
    runs: Path, port: int, browser: bool, steps: int, text: Path | None, checkpoint_every: int | None
) -> None:
    """Run the two processes until both are done or Ctrl-C; the training first, so that there is something to see."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"The runs cannot be recorded in {runs}: {error.strerror}.") from error
    # The child must find this very package, wherever the command was given.
    here = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SAMPLE_RUNS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "app"]
    training = [*command, "demo", "--no-serve", "--runs", str(runs), "--steps", str(steps)]
    training += ["--text", str(text)] if text else []
    training += ["--checkpoint-every", str(checkpoint_every)] if checkpoint_every else []
    folders = [str(runs), *([str(SAMPLE_RUNS)] if SAMPLE_RUNS.is_dir() else [])]
    dashboard = [*command, "dash", *folders, "--port", str(port), "--no-browser"]
    url = f"http://{HOST}:{port}"

    trainer = subprocess.Popen(training, env=here, preexec_fn=_renice if os.name == "posix" else None)
    server = subprocess.Popen(dashboard, env=here, stdout=subprocess.DEVNULL)
    click.echo(f"Dashboard: {url}  (Ctrl-C ends everything)", err=True)
    if browser:
        open_browser(port)
    try:
        failed = _wait(trainer, server)
        if failed:
            raise click.ClickException(failed)
        click.echo("Training is done; the dashboard stays open until Ctrl-C.", err=True)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        _end(trainer, server)
        if list(runs.glob("*/run.json")):
            again = shlex.join(["depthscope", "dash", *folders])
            click.echo(f"\nThe runs are in {runs}. To come back: {again}", err=True)
        else:
            click.echo("\nNothing was recorded yet.", err=True)


def _wait(trainer: subprocess.Popen, server: subprocess.Popen) -> str | None:
    """Until the training is done; what went wrong, if something did."""
    while trainer.poll() is None:
        if server.poll() is not None:
            return "The dashboard ended; its message is above."
        time.sleep(0.2)
    return "The training ended early; its message is above." if trainer.returncode else None


def _end(*processes: subprocess.Popen) -> None:
    """Ctrl-C reaches children by itself; whoever is still there is asked, and given time to seal its runs."""
    # A second Ctrl-C must not leave children behind.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    finally:
        signal.signal(signal.SIGINT, previous)


def _renice() -> None:
    os.nice(10)
