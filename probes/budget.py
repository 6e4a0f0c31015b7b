"""What attribution costs here: what is told of it, its bytes, measured on a forward and a backward, and how many sequences
fit."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from probes.effects import Effects
from probes.manifest import RunError
from probes.objective import token_means

_SPARE = 1.5  # what is computed and thrown away again takes memory beside what is kept


@dataclass(frozen=True)
class Estimate:
    """What is to come: `seconds` in all, `bytes` at most (of the whole process, on the host), `forwards` without and
    `backwards` with a backward, each of `at_once` sequences; and the share that is `done` already."""

    seconds: float
    bytes: int
    forwards: int
    backwards: int
    at_once: int
    sequences: int
    done: float = 0.0


def bytes_of_one(one: Effects) -> int:
    """Bytes that a forward and backward of one sequence keep, and what it hands over, with something to spare."""
    mine = {x.untyped_storage().data_ptr() for x in _tensors_of(one)}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = token_means(_gated(one)).sum()  # holds what was packed until it is counted
    return int(_SPARE * sum(kept.values())) + (0 if total.isnan() else 1)


def sequences_that_fit(each: int, wanted: int, memory: float | None, device: torch.device) -> int:
    """How many sequences of so many bytes fit at once, up to `wanted`; `memory` bounds the process (on a GPU what it
    allocates there), by default half of what is free. RunError where not even one fits."""
    used, free = _memory(device)
    room = free / 2 if memory is None else min(memory - used, free)
    if each > room:
        bound = f"{memory / 1e9:.3g} GB" if memory is not None else "half of what is free"
        raise RunError(
            f"Too little memory: one sequence takes {each / 1e9:.2g} GB beside the {used / 1e9:.2g} GB in use, and {bound} "
            "is not enough. Allow more, or take shorter sequences."
        )
    return max(1, min(wanted, int(room // max(each, 1))))


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _gated(effects: Effects) -> Tensor:
    edges = None if effects.gates.no_edges else effects.edges.clone().requires_grad_()
    return effects.value(edges, effects.layers.clone().requires_grad_())


def _tensors_of(effects: Effects) -> list[Tensor]:
    root: nn.Module = effects._root
    return [*root.parameters(), *root.buffers(), *(x for x in effects._args if isinstance(x, Tensor))]


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use by this process, and free, on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return resident(), min(_free_here(), _free_in_group())


def _free_here() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (told,) = [line for line in lines if line.startswith("MemAvailable:")]
        return int(told.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 8e9  # not known here


def _free_in_group() -> float:
    """What a container leaves this process."""
    try:
        most, used = (
            (Path("/sys/fs/cgroup") / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return float("inf") if most == "max" else int(most) - int(used)
    except (OSError, ValueError):
        return float("inf")
