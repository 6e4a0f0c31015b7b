"""What happens to processes that train together: scenes of `ranks_at_work`, each played by every process.

A scene writes what it saw to FOLDER/<scene>.<rank>.json, for the test to judge.
"""

import json
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import probes
from probes import processes
from tests.probes.models import decoder, loss_of, sgd, wait_for

PLAYED = {}


def scene(play):
    PLAYED[play.__name__] = play
    return play


def play(name: str, rank: int, folder: Path) -> None:
    seen = PLAYED[name](rank, folder / name)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wrapped(rank: int = 0, **changes):
    model = decoder("prenorm", blocks=changes.pop("blocks", 1), **changes)
    return nn.parallel.DistributedDataParallel(model), sgd(model)


def step(model, optimizer, rank: int, number: int, size: int = 2) -> None:
    tokens = torch.randint(17, (size, 8), generator=torch.Generator().manual_seed(10 * number + rank))
    optimizer.zero_grad()
    logits = model(tokens)
    (loss_of(logits, tokens) if size else logits.sum()).backward()
    optimizer.step()


def recorded(model, optimizer, rank: int, path: Path, numbers, **options) -> None:
    with probes.record(model, path, optimizer=optimizer, every=1, **options):
        for number in numbers:
            step(model, optimizer, rank, number)


def refusal(path, model, **options) -> str:
    try:
        probes.record(model, path, **options)
    except probes.RunError as error:
        return str(error)
    return ""


@scene
def nothing(rank, path):
    """Rank 1 has a batch without sequences in step 1."""
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True):
        for number in range(3):
            step(model, optimizer, rank, number, size=0 if (rank, number) == (1, 1) else 2)


@scene
def asked(rank, path):
    """Rank 0 alone wants step 2 recorded."""
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer, every=4) as recorder:
        for number in range(6):
            if (rank, number) == (0, 2):
                recorder.now()
            step(model, optimizer, rank, number)


@scene
def refused(rank, path):
    """Every process is told the same."""
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer):
        second = refusal(path, model, optimizer=optimizer, resume=1)
        dist.barrier()
    again = refusal(path, model, optimizer=optimizer)
    every = refusal(path.with_name("other"), model, optimizer=optimizer, every=1 + rank)
    step = refusal(path.with_name("later"), model, optimizer=optimizer, resume=1 + rank)
    places = refusal(path.with_name("same" if rank else "another"), model, optimizer=optimizer, ranks="local")
    stage, own = wrapped(blocks=1)[0].module, decoder("prenorm", blocks=1 + rank)
    stages = refusal(path.with_name("stages"), own, optimizer=sgd(own))
    ill = refusal(path.with_name("ill"), nn.Linear(2, 2) if rank else stage)
    path.with_name("file").touch()
    nowhere = refusal(path.with_name("file") / "run", stage)
    word = refusal(path.with_name("word"), stage, ranks="all")
    return {
        "again": again,
        "second": second,
        "every": every,
        "step": step,
        "places": places,
        "stages": stages,
        "ill": ill,
        "word": word,
        "nowhere": nowhere,
    }


@scene
def stages(rank, path):
    """Each process holds other layers, as in a pipeline, and records its own."""
    model = decoder("prenorm", blocks=1 + rank)
    optimizer = sgd(model)
    recorded(model, optimizer, rank, path, range(2), ranks="local")


@scene
def resumed(rank, path):
    model, optimizer = wrapped()
    recorded(model, optimizer, rank, path, range(4))
    recorded(model, optimizer, rank, path, range(2, 5), resume=2)


@scene
def joined(rank, path):
    """What one process began goes on with two."""
    model, optimizer = wrapped()
    if rank == 0:
        alone = decoder("prenorm", blocks=1)
        recorded(alone, sgd(alone), rank, path, range(4), ranks="one")
    else:
        step(decoder("prenorm", blocks=1), sgd(nn.Linear(1, 1)), rank, 0)
    dist.barrier()
    recorded(model, optimizer, rank, path, range(2, 5), resume=2)


@scene
def counted(rank, path):
    """The collectives of the recorder, by step: "ours" in its thread, and "theirs" begun by the thread that trains."""
    model = decoder("prenorm", blocks=1)
    optimizer, ours, theirs = sgd(model), [], []
    with probes.record(model, path, optimizer=optimizer, every=2, matrices_every=4) as recorder:
        merging = recorder._joint._together.merging
        merging._group = Counted(merging._group)
        for number in range(6):
            with Collectives() as seen:
                step(model, optimizer, rank, number)
            theirs.append(seen.count)
            wait_for(lambda: merging._handed == merging._done)
            ours.append(merging._group.taken())
    return {"ours": ours, "theirs": theirs}


class Collectives(TorchDispatchMode):
    """Counts those that this thread begins."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


class Counted:
    """A process group that notes what is asked of it."""

    def __init__(self, group):
        self._group, self._asked = group, []

    def taken(self) -> list[str]:
        asked, self._asked = self._asked, []
        return asked

    def __getattr__(self, name):
        self._asked.append(name)
        return getattr(self._group, name)


@scene
def saved(rank, path):
    """A checkpoint of torch.distributed.checkpoint is written and read between two steps; gradients are clipped by torch."""
    norms = []
    for name, save in (("without", False), ("with", True)):
        model = decoder("full", blocks=1)
        for block in model.blocks:
            fully_shard(block.attention, reshard_after_forward=False)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with probes.record(model, path / name, optimizer=optimizer, every=1, strict=True):
            for number in range(4):
                tokens = torch.randint(
                    17, (2, 8), generator=torch.Generator().manual_seed(10 * number + rank)
                )
                loss_of(model(tokens), tokens).backward()
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).full_tensor().item())
                optimizer.step()
                optimizer.zero_grad()
                if save and number == 1:
                    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                    dcp.save(state, checkpoint_id=str(path / "checkpoint"))
                    dcp.load(state, checkpoint_id=str(path / "checkpoint"))
                    set_state_dict(
                        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
                    )
    return norms


@scene
def half(rank, path):
    """Parameters and activations in bfloat16, by FSDP2's policy."""
    model = decoder("prenorm", blocks=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy, mesh=init_device_mesh("cpu", (2,)))
    recorded(model, sgd(model), rank, path, range(3), matrices_every=2, strict=True)


@scene
def unknown(rank, path):
    """Nobody says what becomes of the gradients."""
    model = decoder("prenorm", blocks=1)
    recorded(model, sgd(model), rank, path, range(2))


@scene
def one(rank, path):
    """Rank 0 alone records, once by mistake and once on purpose."""
    model, optimizer = wrapped()
    waited, recorder, whole = "", None, ""
    if rank == 0:
        processes._SAY, processes.WAIT, before = 0.1, 0.5, (processes._SAY, processes.WAIT)
        waited = refusal(path, model, optimizer=optimizer)
        processes._SAY, processes.WAIT = before
        recorder = probes.record(model, path, optimizer=optimizer, every=1, ranks="one")
        spread = fully_shard(decoder("prenorm", blocks=1), mesh=init_device_mesh("cpu", (1,)))
        whole = refusal(path.with_name("whole"), spread, ranks="one")
    else:
        processes._meetings += 1  # as if it had been called here too
    for number in range(2):
        step(model, optimizer, rank, number)
    if recorder is not None:
        recorder.close()
    norms = [p.grad.norm().item() for p in model.parameters()]
    return {"waited": waited, "whole": whole, "norm": sum(each**2 for each in norms) ** 0.5}
