"""Processes that train on unequal shares, and wrappers that are refused: scenes of `ranks_at_work`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform

import probes
from tests.probes.models import decoder, sgd
from tests.probes.ranks_scenes import refusal, scene, step, wrapped


@scene
def blank(rank, path):
    """No token of rank 1 counts in step 1."""
    model, optimizer = wrapped()

    def counted(args, kwargs):
        return torch.full(args[0].shape, (rank, number) != (1, 1))

    with probes.record(
        model, path, optimizer=optimizer, mask=counted, every=1, matrices_every=1, strict=True
    ):
        for number in range(3):
            step(model, optimizer, rank, number)


@scene
def joins(rank, path):
    """Rank 1 has three batches, rank 0 has five: DDP's join goes on without it."""
    model, optimizer = wrapped()
    with probes.record(model, path, optimizer=optimizer, every=1, strict=True), Join([model]):
        for number in range(3 if rank else 5):
            step(model, optimizer, rank, number)
    return [parameter.sum().item() for parameter in model.parameters()]


@scene
def older(rank, path):
    """FSDP1, and DDP around slices."""
    sharded = FullyShardedDataParallel(decoder("prenorm", blocks=1), device_id=torch.device("cpu"))
    model = decoder("prenorm", blocks=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(
        model.blocks[0].mlp,
        mesh,
        {"up": ColwiseParallel(), "gate": ColwiseParallel(), "output": RowwiseParallel()},
    )
    _pre_dp_module_transform(model)
    sliced = refusal(path, nn.parallel.DistributedDataParallel(model), optimizer=sgd(model))
    return {"fsdp": refusal(path, sharded, optimizer=sgd(sharded)), "sliced": sliced}
