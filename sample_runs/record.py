"""Record the sample runs: `python sample_runs/record.py` (run it again to continue where it stopped).

Four decoders of 24 layers (12 transformer blocks) learn the Python standard library's source: PreNorm, Full and Block
AttnRes to the end, and a Block run whose process is killed on the way, as it happens at night. A finished run is left
alone, an unfinished one is recorded anew. About 10 minutes on two idle CPU cores (the recorded ones were
not idle).
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402

import probes  # noqa: E402
from probes.manifest import RANK_FOLDER  # noqa: E402
from probes.shard import read_shard, shard_name, shard_steps, write_shard  # noqa: E402
from probes.vocabulary import FORMAT_VERSION  # noqa: E402

SHAPE = {"width": 128, "blocks": 12, "heads": 4, "kv_heads": 2, "context": 256}
RUNS = {
    "prenorm": {"residual": "prenorm"},
    "full": {"residual": "full"},
    "block": {"residual": "block", "layers_per_block": 3},
    "block-killed": {"residual": "block", "layers_per_block": 6},
}
STEPS, KILL_AT = 500, 125


def main() -> None:
    for name in RUNS:
        if _recorded(name):
            print(f"{name}: there already")
            continue
        shutil.rmtree(HERE / name, ignore_errors=True)
        process = subprocess.Popen([sys.executable, __file__, name])
        if name == "block-killed":
            _kill_on_the_way(process, name)
        elif process.wait():
            sys.exit(f"{name} failed")
        _join(HERE / name / RANK_FOLDER)


def _recorded(name: str) -> bool:
    try:
        run = probes.open_run(HERE / name)
    except probes.RunError:
        return False
    return run.status == "finished" or (name == "block-killed" and run.last_step >= KILL_AT)


def _kill_on_the_way(process: subprocess.Popen, name: str) -> None:
    while process.poll() is None:
        time.sleep(1)
        if _recorded(name):
            process.send_signal(signal.SIGKILL)
    process.wait()


def _join(folder: Path) -> None:
    """Put all rows of a run into one shard: hundreds of small files do not belong into a repository."""
    parts = sorted(folder.glob("*.safetensors"))
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
    shutil.rmtree(folder)
    joined.rename(folder)


def record(name: str) -> None:
    from app.training import Corpus, DecoderConfig, RecordedTraining, Schedule, TrainingConfig, in_turn

    config = TrainingConfig(steps=STEPS, batch=4, context=SHAPE["context"])
    schedule = Schedule(every=4, matrices_every=20, validate_every=20)
    decoder = DecoderConfig(**SHAPE, **RUNS[name])
    in_turn([RecordedTraining(HERE / name, decoder, config, Corpus.standard_library(), schedule, ["sample"])])


if __name__ == "__main__":
    record(sys.argv[1]) if sys.argv[1:] else main()
