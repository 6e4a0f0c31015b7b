"""Processes that train one model together, each with the real recorder; and one process that trains it on the same batch.

    python -m tests.probes.ranks_at_work FOLDER WORLD CASE...

Each case is recorded at FOLDER/<case> by WORLD processes, and at FOLDER/<case>-single by one; or it is a scene.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import probes
from tests.probes import ranks_failing as _  # noqa: F401  its scenes are played
from tests.probes import ranks_stages
from tests.probes.foreign import Foreign
from tests.probes.models import decoder, loss_of
from tests.probes.ranks_scenes import PLAYED, free_port, play

STEPS, CLIP = 3, 0.25


class Masked(nn.Module):
    """A decoder that is given a mask [B, T], by which the loss alone is changed."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, attention_mask):
        return self.inner(tokens)


def batch(step: int, rank: int, micro: int = 0, size: int = 2):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    tokens = torch.randint(17, (size, 8), generator=generator)
    mask = torch.ones_like(tokens)
    mask[:, 8 - 3 * rank - micro :] = 0  # each rank has another number of tokens that count
    return tokens, mask


def loss(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if isinstance(getattr(model, "module", model), Masked):
        return loss_of(model(tokens, mask)[mask > 0].unsqueeze(0), tokens[mask > 0])
    return loss_of(model(tokens), tokens)


# How a model is spread: each gives the model, and how many data-parallel parts the batch has


def ddp(model):
    return nn.parallel.DistributedDataParallel(model), dist.get_world_size()


def inner(model):
    """Wrapped, but the recorder is shown what is inside."""
    return ddp(model)


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(model, mesh), mesh.size()


def one_group(model):
    """All parameters in one FSDP group."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))), dist.get_world_size()


def tp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return _sliced(model, mesh), 1


def sp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return _sequence_sliced(model, mesh), 1


def fsdp_tp(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return _sharded(_sliced(model, mesh["tp"]), mesh["dp"]), 2


def fsdp_sp(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return _sharded(_sequence_sliced(model, mesh["tp"]), mesh["dp"]), 2


def hsdp(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return _sharded(model, mesh), 4


def _sharded(model, mesh):
    core = getattr(model, "inner", model)
    for block in core.blocks:  # layer by layer, for a block takes a stream, in which FSDP finds no tensors
        fully_shard(block.attention, mesh=mesh)
        fully_shard(block.mlp, mesh=mesh)
    return fully_shard(model, mesh=mesh)


_SLICES = {
    **{f"attention.{name}": ColwiseParallel for name in ("query", "key", "value")},
    "attention.output": RowwiseParallel,
    "mlp.gate": ColwiseParallel,
    "mlp.up": ColwiseParallel,
    "mlp.output": RowwiseParallel,
}


def _sliced(model, mesh):
    for block in getattr(model, "inner", model).blocks:
        parallelize_module(block, mesh, {name: slices() for name, slices in _SLICES.items()})
        _fewer_heads(block.attention, mesh.size())
    return model


def _sequence_sliced(model, mesh):
    for block in model.blocks:
        plan = {name: slices() for name, slices in _SLICES.items()}
        for layer, more in (("attention", (None,)), ("mlp", ())):
            plan[f"{layer}_norm"] = SequenceParallel()
            plan[layer] = PrepareModuleInput(
                input_layouts=(Shard(1), *more), desired_input_layouts=(Replicate(), *more)
            )
            plan[f"{layer}.output"] = RowwiseParallel(output_layouts=Shard(1))
        parallelize_module(block, mesh, plan)
        _fewer_heads(block.attention, mesh.size())
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "final_norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, ends)


def _fewer_heads(attention, parts: int) -> None:
    attention.heads //= parts
    attention.kv_heads //= parts


def views(model):
    """Gradients are views of buckets, and the graph is always one."""
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=True
    ), dist.get_world_size()


def unused(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), dist.get_world_size()


def compiled_ddp(model):
    # What inductor makes of the graphs is not the question, and takes minutes.
    return torch.compile(
        nn.parallel.DistributedDataParallel(model), backend="aot_eager"
    ), dist.get_world_size()


def compiled_fsdp(model):
    for block in model.blocks:
        block.attention.compile()
        block.mlp.compile()
    return fsdp(model)


SPREAD = {
    each.__name__: each
    for each in (
        *(ddp, inner, views, unused, fsdp, one_group, tp, sp, fsdp_tp, fsdp_sp, hsdp),
        *(compiled_ddp, compiled_fsdp),
    )
}


def made(case: str) -> nn.Module:
    if "experts" in case:
        return ranks_stages.made(case)
    if "found" in case:
        return Foreign("list", width=8)
    kind = "prenorm" if "sp" in case.split("-")[0].split("_") else "full"
    heads = 4 if "4" in case else 2
    blocks = 1 if "compiled" in case else 2
    model = decoder(kind, blocks=blocks, heads=heads, kv_heads=heads)
    if "inf" in case:
        with torch.no_grad():
            model.embedding.weight[3, 0] = torch.inf
    if case == "unused":
        model.idle = nn.Linear(3, 3)
    return Masked(model) if "masked" in case else model


def train(
    case: str, model, recorded, parts: list[int], world: int, path: Path, rank: int = 0, **options
) -> None:
    """`parts` are the data-parallel parts of the batch that this process sees."""
    micro_batches = 2 if "accumulate" in case else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probes.record(
        recorded, path, optimizer=optimizer, every=1, matrices_every=2, strict=True, **options
    ) as recorder:
        for step in range(STEPS):
            for micro in range(micro_batches):
                with _without_sync(model, micro == micro_batches - 1):
                    _total(case, model, step, parts, world, micro, micro_batches).backward()
            ranks_stages.clip(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=1.0 + rank)


def _total(case, model, step, parts, world, micro, micro_batches):
    """The loss of these parts: the mean over the parts of each one's mean over its tokens."""
    batches = [batch(step, part, micro) for part in parts]
    if len(parts) == 1:
        return loss(model, *batches[0]) / micro_batches
    tokens, mask = (torch.cat(each) for each in zip(*batches, strict=True))
    if "masked" in case:
        logits = model(tokens, mask)
    else:
        logits, mask = model(tokens), torch.ones_like(mask)
    each = [
        loss_of(one[m > 0].unsqueeze(0), t[m > 0])
        for one, t, m in zip(
            logits.chunk(len(parts)), tokens.chunk(len(parts)), mask.chunk(len(parts)), strict=True
        )
    ]
    return sum(each) / len(parts) / micro_batches


def _without_sync(model, last: bool):
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def is_staged(case: str) -> bool:
    return case.startswith((*ranks_stages.ONE_STAGE, *ranks_stages.TWO_STAGES))


def work(rank: int, world: int, port: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for case in cases:
        if case in PLAYED:
            play(case, rank, folder)
            continue
        if is_staged(case):
            ranks_stages.run_stages(case, folder / case)
            continue
        model = made(case)
        spread, data = SPREAD[case.removeprefix("local-").split("-")[0]](model)
        part = rank * data // world
        options = {"ranks": "local"} if "local" in case else {}
        shown = model if case.startswith("inner") else spread
        train(case, spread, shown, [part], data, folder / case, rank, **options)
    if dist.is_initialized():
        dist.destroy_process_group()


def alone(folder: Path, world: int, cases: list[str]) -> None:
    halves = {"tp": 1, "sp": 1, "fsdp_tp": 2, "fsdp_sp": 2}
    for case in cases:
        if case in PLAYED or "local" in case:
            continue
        if is_staged(case):
            ranks_stages.run_alone(case, folder / f"{case}-single", world // 2)
            continue
        data = halves.get(case.split("-")[0], world)
        model = made(case)
        train(case, model, model, list(range(data)), data, folder / f"{case}-single")


if __name__ == "__main__":
    folder, world, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    port = free_port()
    processes = [
        mp.get_context("spawn").Process(target=work, args=(rank, world, port, folder, cases))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    alone(folder, world, cases)
    for process in processes:
        process.join()
    allowed = {0, -signal.SIGKILL} if {"dead", "headless"} & set(cases) else {0}
    sys.exit(any(process.exitcode not in allowed for process in processes))
