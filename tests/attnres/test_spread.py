"""Converted models spread over processes, by DistributedDataParallel and FSDP2: the gradients of one process alone."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import attnres
from tests.attnres.converted import RESIDUALS, checkpointed, prepared
from tests.attnres.families import FAMILIES, logits_of

BLOCKS = {"DiT": lambda model: model.blocks, "Llama": lambda model: model.model.layers}


def sharded(name, model):
    """Every transformer block by itself, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in BLOCKS[name](model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "DDP": lambda name, model: nn.parallel.DistributedDataParallel(model),
    "FSDP2": sharded,
    "FSDP2, checkpointed": lambda name, model: sharded(name, checkpointed(model)),
}


def largest_difference(name, kind, way) -> float:
    """Of any gradient, relative: half of the batch for each of two processes, all of it for one."""
    _, _, model, inputs = prepared(name, kind)
    torch.manual_seed(1)  # prepared alike everywhere
    alone = copy.deepcopy(model)
    logits_of(alone(**inputs)).square().mean().backward()
    share = {key: x.chunk(dist.get_world_size())[dist.get_rank()] for key, x in inputs.items()}
    spread = WAYS[way](name, model)
    logits_of(spread(**share)).square().mean().backward()
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    pairs = [
        (whole(ours.grad), theirs.grad)
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True)
    ]
    largest = max(theirs.norm() for _, theirs in pairs)
    return max(((ours - theirs).norm() / largest).item() for ours, theirs in pairs)


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone: all hooks of both, and nobody to wait for."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_are_those_of_the_bare_model(way, kind, alone):
    assert largest_difference("DiT", kind, way) < 1e-12


def play(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name in BLOCKS:
        for kind in ("full", "block of 3, across transformer blocks"):
            for way in WAYS:
                found = largest_difference(name, kind, way)
                assert found < (1e-12 if name == "DiT" else 3e-5), f"{name}, {kind}, {way}: {found}"
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_have_the_gradients_of_one(tmp_path):
    pytest.importorskip("transformers")
    multiprocessing.spawn(play, (str(tmp_path),), nprocs=2)


def test_a_state_that_only_shares_the_memory_has_no_sources(alone):
    """Detached, for instance: whoever does that means to cut gradients off."""
    _, _, model, inputs = prepared("DiT")
    model.blocks[1].register_forward_pre_hook(
        lambda module, args: (args[0].detach(), *args[1:]), prepend=True
    )
    with pytest.raises(RuntimeError, match=r"blocks\.1 was given a state without its sources"):
        model(**inputs)


def test_what_is_spread_already_is_refused(alone):
    model = FAMILIES["DiT"].make()
    for spread, says in (
        (lambda: sharded("DiT", model), "not under FSDPModule"),
        (lambda: nn.parallel.DistributedDataParallel(FAMILIES["DiT"].make()), "not under Distributed"),
    ):
        with pytest.raises(ValueError, match=f"^model must be the module itself, {says}"):
            attnres.convert(spread(), "full", example=FAMILIES["DiT"].inputs())
