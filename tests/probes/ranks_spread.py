"""How a model is spread over processes: each function gives the model, and how many data-parallel parts the batch has."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model), dist.get_world_size()


def inner(model):
    """Wrapped, but the recorder is shown what is inside."""
    return ddp(model)


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(model, mesh), mesh.size()


def offloaded(model):
    """Parameters wait on the CPU; without a GPU nothing is moved, but all goes through FSDP's code for it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(model, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), mesh.size()


def checkpointed_ddp(model):
    return ddp(_checkpointed(model))


def checkpointed_fsdp(model):
    return fsdp(_checkpointed(model))


def _checkpointed(model):
    for block in model.blocks:
        block.attention, block.mlp = checkpoint_wrapper(block.attention), checkpoint_wrapper(block.mlp)
    return model


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


def _sharded(model, mesh, **options):
    core = getattr(model, "inner", model)
    for block in core.blocks:  # layer by layer, for a block takes a stream, in which FSDP finds no tensors
        for layer in (getattr(block, "attention", None) or block.attn, block.mlp):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


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


def inductor_ddp(model):
    return torch.compile(nn.parallel.DistributedDataParallel(model)), dist.get_world_size()


def over_fsdp(model):
    """Compiled from the outside: the graph is broken before and after each transformer block."""
    for block in model.blocks.values():
        fully_shard(block)
    return torch.compile(fully_shard(model), backend="aot_eager"), dist.get_world_size()


def compiled_fsdp(model):
    for block in model.blocks:
        block.attention.compile()
        block.mlp.compile()
    return fsdp(model)


SPREAD = {
    each.__name__: each
    for each in (
        *(ddp, inner, views, unused, fsdp, one_group, tp, sp, fsdp_tp, fsdp_sp, hsdp),
        *(compiled_ddp, compiled_fsdp, inductor_ddp, over_fsdp),
        *(offloaded, checkpointed_ddp, checkpointed_fsdp),
    )
}
