"""Where a resumed training goes on: at which step, and after how many seconds."""

import operator
from collections.abc import Sequence
from pathlib import Path

import torch

from probes import elsewhere
from probes import manifest as files
from probes.attempts import attempt_folder, claimed
from probes.manifest import Manifest, RunError
from probes.shard import ShardError, read_shard, shard_names, shard_steps
from probes.vocabulary import MOST_STEP


def first_step(resume: bool | int, optimizers: Sequence[torch.optim.Optimizer], path: Path) -> int:
    """The step that `resume=` gives, or True: the one that the optimizer counts. Raises RunError where neither is known."""
    if resume is False:
        return 0
    if resume is True:
        counted = steps_counted(optimizers)
        if counted or not (path / files.MANIFEST).exists():
            return counted
        raise RunError(
            "resume=True cannot tell at which step training goes on, for the optimizer counts none: load its state "
            "before probes.record, or give the step, as resume=1000 (resume=0 to train from the beginning)."
        )
    try:
        step = operator.index(resume)
    except TypeError:
        step = -1
    if not 0 <= step <= MOST_STEP:
        raise RunError(f"resume is {resume!r}: give the step at which training goes on, or True.")
    return step


def steps_counted(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Steps completed as the state of Adam and its kin tells them: the most of any parameter; 0 where none tells."""
    counts = [
        int(state["step"])
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict) and isinstance(state.get("step"), int | float | torch.Tensor)
    ]
    return max(counts, default=0)


def seconds_before(path: Path, step: int) -> float:
    """`wall_time` of the last visible row before `step`, 0 where there is none. Reads as few shards as it can."""
    elsewhere.look(path)
    limit = step
    for number in (*reversed(claimed(path)), 0):
        folder = attempt_folder(path, number)
        try:
            begun = Manifest.read(folder, files.ATTEMPT if number else files.MANIFEST).step
        except RunError:
            continue
        for name in reversed(shard_names(folder / files.RANK_FOLDER)):
            if shard_steps(name)[0] >= limit:
                continue
            try:
                tensors = read_shard(folder / files.RANK_FOLDER / name).tensors
            except (ShardError, FileNotFoundError):
                continue
            if "wall_time" in tensors and (before := tensors["wall_time.step"] < limit).any():
                return float(tensors["wall_time"][before].max())
        limit = min(limit, begun)
    return 0.0
