"""What happens to processes that train together: scenes of `ranks_at_work`, each played by every process.

A scene writes what it saw to FOLDER/<scene>.<rank>.json, for the test to judge.
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import probes
from probes import processes
from tests.probes.models import decoder, loss_of, sgd

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
    probes.record(model, path, optimizer=optimizer).close()
    again = refusal(path, model, optimizer=optimizer)
    every = refusal(path.with_name("other"), model, optimizer=optimizer, every=1 + rank)
    places = refusal(path.with_name("same" if rank else "another"), model, optimizer=optimizer, ranks="local")
    stage, own = wrapped(blocks=1)[0].module, decoder("prenorm", blocks=1 + rank)
    stages = refusal(path.with_name("stages"), own, optimizer=sgd(own))
    ill = refusal(path.with_name("ill"), nn.Linear(2, 2) if rank else stage)
    word = refusal(path.with_name("word"), stage, ranks="all")
    return {"again": again, "every": every, "places": places, "stages": stages, "ill": ill, "word": word}


@scene
def stages(rank, path):
    """Each process holds other layers, as in a pipeline, and records its own."""
    model = decoder("prenorm", blocks=1 + rank)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1, ranks="local"):
        for number in range(2):
            step(model, optimizer, rank, number)


@scene
def resumed(rank, path):
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer, every=1):
        for number in range(4):
            step(model, optimizer, rank, number)
    with probes.record(model, path, optimizer=optimizer, every=1, resume=2):
        for number in range(2, 5):
            step(model, optimizer, rank, number)


@scene
def unknown(rank, path):
    """Nobody says what becomes of the gradients."""
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1):
        for number in range(2):
            step(model, optimizer, rank, number)


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


@scene
def gone(rank, path):
    """torch's groups are destroyed before the recorder is closed, as at the end of many scripts."""
    model, optimizer = wrapped()
    recorder = probes.record(model, path, optimizer=optimizer, every=1)
    for number in range(2):
        step(model, optimizer, rank, number)
    port = [free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    recorder.close()
    os.environ["MASTER_PORT"] = str(port[0])
    dist.init_process_group("gloo", rank=rank, world_size=2)


@scene
def dead(rank, path):
    """Rank 1 is killed at step 3 of 8; the training of rank 0 needs it no more, and goes on to its end."""
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1):
        for number in range(8):
            if number == 3:
                dist.barrier()
                if rank:
                    time.sleep(1)  # until what was handed over is summed
                    os.kill(os.getpid(), signal.SIGKILL)
            step(model, optimizer, rank, number)
    return {"steps": 8}
