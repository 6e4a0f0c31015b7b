"""Record the sample runs: `python sample_runs/record.py` (run it again to continue where it stopped).

    python sample_runs/record.py --device cuda --minutes 9

A finished run of such a device is left alone, an unfinished one is recorded anew; after so many minutes no further run is
begun, and one that is under way is given up. A run replaces the one of its name only when it is complete. On a CPU the
runs are smaller (plans.py); about half an hour on two idle cores.

Other Pythons have other libraries. To learn the very same text elsewhere, write it into one file, and take that along:

    python sample_runs/record.py --pack text.zip
    python sample_runs/record.py --text text.zip
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import probes  # noqa: E402
from attnres import Corpus  # noqa: E402
from attnres.corpus import pack_library  # noqa: E402
from probes.manifest import RANK_FOLDER  # noqa: E402
from probes.shard import read_shard, shard_name, shard_steps, write_shard  # noqa: E402
from probes.vocabulary import FORMAT_VERSION  # noqa: E402
from sample_runs.plans import Plan, plans  # noqa: E402

UNFINISHED = ".unfinished"
"""The folder, beside the runs, of the one that is being recorded."""


def main() -> None:
    options = parsed()
    if options.pack:
        pack(options.pack)
        return
    known = {plan.name: plan for plan in plans(options.device)}
    if options.run:
        record(known[options.run], options)
        return
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        sys.exit(f"There is no sample run {', '.join(unknown)}: choose among {', '.join(known)}.")
    until = time.monotonic() + 60 * options.minutes
    failed = []
    for plan in known.values():
        if options.only and plan.name not in options.only:
            continue
        if recorded(options.into / plan.name, plan):
            print(f"{plan.name}: there already", flush=True)
        elif plan.name.startswith("kimi") and (why := no_kimi()):
            print(f"{plan.name}: left out, {why}", flush=True)
            if options.only:
                sys.exit(1)
        elif time.monotonic() > until or not _recorded_in_time(plan, options, until, failed):
            sys.exit(f"{plan.name} is to be recorded yet: give the command again.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. What was said above tells why; the others are there.")


def no_kimi() -> str | None:
    """Why there is no Kimi Linear here, or None where there is one."""
    try:
        from transformers import KimiLinearForCausalLM  # noqa: F401
    except ImportError as error:
        return f"for it takes transformers 5.20 or newer ({str(error).splitlines()[0]})"
    return None


def pack(path: Path) -> None:
    """The library's text as one file, from which `--text` takes the same text, byte for byte and in the same parts."""
    pack_library(path)
    text = Corpus.from_path(path)
    print(f"{path}: {text.name}, {path.stat().st_size / 1e6:.1f} MB, sha256 of the text {text.sha256}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python sample_runs/record.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later than this")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs alone")
    parser.add_argument(
        "--text", type=Path, help="file, folder or .zip file to learn (default: Python's own library)"
    )
    parser.add_argument("--steps", type=int, help="at most so many steps of each run: to try the command")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="write the text into one .zip file, and stop"
    )
    parser.add_argument("--checkpoint-every", type=int, help="save the model too, for depthscope attribute")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def _recorded_in_time(plan: Plan, options: argparse.Namespace, until: float, failed: list[str]) -> bool:
    """Record a run in a process of its own; whether it was done in time. One that fails is told in `failed`."""
    aside = options.into / UNFINISHED
    folder = aside / plan.name
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{plan.name}: {plan.says}", flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--into", str(aside), "--run", plan.name]
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if time.monotonic() > until:
                return False
            if plan.kill_at is not None and recorded(folder, plan):
                process.send_signal(signal.SIGKILL)
        if not recorded(folder, plan):
            failed.append(plan.name)
            return True
        _join(folder / RANK_FOLDER)
        shutil.rmtree(options.into / plan.name, ignore_errors=True)
        os.replace(folder, options.into / plan.name)
        return True
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are recorded beside it
            aside.rmdir()


def recorded(folder: Path, plan: Plan) -> bool:
    """Whether this run is there, of a device of that kind, as far as it goes."""
    try:
        run = probes.open_run(folder)
    except probes.RunError:
        return False
    if kind(run.config.get("training", {}).get("device", "cpu")) != kind(plan.training.device):
        return False
    return run.status == "finished" or (plan.kill_at is not None and run.last_step >= plan.kill_at)


def kind(device: str) -> str:
    return device.partition(":")[0]


def _join(folder: Path) -> None:
    """Put all rows of a run into one shard: hundreds of small files do not belong into a repository. Other files of
    the run, as token snapshots, stay what they are."""
    parts = sorted(part for part in folder.glob("*.safetensors") if shard_steps(part.name))
    rows: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for metric, values in read_shard(part).tensors.items():
            rows.setdefault(metric, []).append(values)
    last = shard_steps(parts[-1].name)[1]
    whole = {metric: np.concatenate(values) for metric, values in rows.items()}
    # Written beside the parts first: nothing is lost if this is stopped.
    joined = folder.with_name("joined")
    joined.mkdir()
    write_shard(joined / shard_name(0, last), whole, {"format": str(FORMAT_VERSION), "rank": "0"})
    for other in set(folder.iterdir()) - set(parts):
        shutil.copy2(other, joined)
    shutil.rmtree(folder)
    joined.rename(folder)


def record(plan: Plan, options: argparse.Namespace) -> None:
    from dataclasses import replace

    from app.training import RecordedTraining, in_turn
    from benchmarks.provenance import commit

    corpus = Corpus.from_path(options.text) if options.text else Corpus.standard_library()
    steps = min(options.steps or plan.training.steps, plan.training.steps)
    training = replace(plan.training, steps=steps)
    recorded = RecordedTraining(
        options.into / plan.name,
        plan.model(),
        training,
        corpus,
        replace(plan.schedule, checkpoint_every=options.checkpoint_every),
        plan.tags,
    )
    recorded.described["sample"] = {
        "says": plan.says,
        "commit": commit(),
        "composition": corpus.composition(),
    }
    in_turn([recorded])


if __name__ == "__main__":
    main()
