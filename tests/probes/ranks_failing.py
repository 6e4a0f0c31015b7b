"""What goes wrong while processes train together: scenes of `ranks_at_work`."""

import os
import signal
import time

import torch.distributed as dist

import probes
from probes import writer
from tests.probes.models import decoder, sgd
from tests.probes.ranks_scenes import free_port, recorded, scene, step, wrapped


@scene
def raises(rank, path):
    """Rank 1 raises at step 2 of 6; rank 0 needs it no more."""
    model = decoder("prenorm", blocks=1)
    try:
        recorded(model, sgd(model), rank, path, Failing(range(6), 2 if rank else 6))
    except ValueError as error:
        return str(error)


class Failing:
    """Numbers, of which one cannot be had."""

    def __init__(self, numbers, bad: int):
        self._numbers, self._bad = numbers, bad

    def __iter__(self):
        for number in self._numbers:
            if number == self._bad:
                raise ValueError("the loss is nowhere")
            yield number


@scene
def slow(rank, path):
    """Rank 1 is late by more than shards stay open, when rank 0 has just sealed one: no row of the step may be sealed before all
    are there, for there is one shard of one name."""
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    before, writer.SEAL_SECONDS = writer.SEAL_SECONDS, 0.1
    with probes.record(model, path, optimizer=optimizer, every=2) as recorder:
        for number in range(4):
            if number == 2:
                time.sleep(2 if rank else 1)
            step(model, optimizer, rank, number)
            if number < 3:
                recorder.log(loss=float(number))
        time.sleep(0 if rank else 1)
    writer.SEAL_SECONDS = before


@scene
def homeless(rank, path):
    """Rank 1 finds no place for its folder, and says nothing to nobody; its numbers are among the sums all the same."""
    if rank == 0:
        path.mkdir()
        (path.parent / "homeless-ready").touch()
    dist.barrier()
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer, every=1):
        if rank:
            for file in (path / "rank-00001").iterdir():
                file.unlink()
            (path / "rank-00001").rmdir()
            (path / "rank-00001").touch()
        dist.barrier()
        for number in range(3):
            step(model, optimizer, rank, number)


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
    return killed(rank, path, 1)


@scene
def headless(rank, path):
    """Rank 0 is, who writes."""
    return killed(rank, path, 0)


def killed(rank, path, who):
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=1) as recorder:
        for number in range(8):
            if number == 3:
                dist.barrier()
                if rank == who:
                    time.sleep(1 if who else 2.5)  # until what was handed over is summed, and sealed
                    os.kill(os.getpid(), signal.SIGKILL)
            step(model, optimizer, rank, number)
    return {"steps": 8, "hooks": len(recorder._hooks)}
