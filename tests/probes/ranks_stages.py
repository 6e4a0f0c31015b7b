"""Pipelines whose stages are recorded as one model: cases of `ranks_at_work`, and the same training by one process."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import probes
from tests.probes.models import loss_of, sgd

STEPS, MICRO, SIZE, CLIP = 4, 4, 2, 0.25  # sequences of one micro-batch
WIDTH, BLOCKS, VOCABULARY = 16, 4, 17


class Experts(nn.Module):
    """Three experts in a list, each token to one."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        share, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            out[chosen == place] = expert(x[chosen == place])
        return out * share.unsqueeze(-1)


class Block(nn.Module):
    def __init__(self, experts: bool):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = (
            Experts() if experts else nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        )

    def forward(self, x):
        q, k, v = self.query(self.attention_norm(x)).chunk(3, -1)
        x = x + self.output(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """A plain decoder, or one stage of it: what it has not is None, as in torchtitan."""

    def __init__(self, experts: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleDict({str(i): Block(experts and i == BLOCKS - 1) for i in range(BLOCKS)})
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x):
        x = x if self.embedding is None else self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.norm is None else self.head(self.norm(x))


def made(case: str) -> Model:
    torch.manual_seed(0)
    model = Model("experts" in case)
    if "inf" in case:
        with torch.no_grad():
            model.blocks["1"].mlp[2].bias[3] = torch.inf
    return model


def cut(model: Model, index: int) -> Model:
    """Stage `index` of two, the first of one block, the second of three."""
    for i in range(BLOCKS):
        if (i > 0) != index:
            del model.blocks[str(i)]
    if index:
        model.embedding = None
    else:
        model.norm = model.head = None
    return model


def clip(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:  # of an expert that no token chose
            parameter.grad.mul_(CLIP)


def tokens(step: int, replica: int) -> torch.Tensor:
    """[MICRO * SIZE, 8], of one replica of the pipeline."""
    generator = torch.Generator().manual_seed(100 * step + replica)
    return torch.randint(VOCABULARY, (MICRO * SIZE, 8), generator=generator)


def plain(model, index, mesh):
    return model


def ddp(model, index, mesh):
    return nn.parallel.DistributedDataParallel(model, process_group=mesh["data"].get_group())


def fsdp(model, index, mesh):
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def run_stages(case: str, path: Path) -> None:
    """`gpipe` or `1f1b`, and then how the replicas of a stage are held together."""
    kind, beside = case.split("-")[:2]
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "stage"))
    index, replica = mesh["stage"].get_local_rank(), mesh["data"].get_local_rank()
    model = {"plain": plain, "ddp": ddp, "fsdp": fsdp}[beside](cut(made(case), index), index, mesh)
    optimizer = sgd(model)
    stage = PipelineStage(model, index, 2, torch.device("cpu"), group=mesh["stage"].get_group())
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, MICRO, loss_fn=loss_of)
    with probes.record(
        schedule, path, optimizer=optimizer, every=2, matrices_every=2, strict=True
    ) as recorder:
        for step in range(STEPS):
            batch, losses = tokens(step, replica), []
            schedule.step(*([] if index else [batch]), target=batch if index else None, losses=losses)
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
            if index and not replica:
                recorder.log(loss=torch.stack(losses).mean(), stage=index)


def run_alone(case: str, path: Path, replicas: int) -> None:
    model = made(case)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, every=2, matrices_every=2, strict=True) as recorder:
        for step in range(STEPS):
            losses = []
            for parts in zip(
                *(tokens(step, replica).split(SIZE) for replica in range(replicas)), strict=True
            ):
                batch = torch.cat(parts)
                losses.append(loss_of(model(batch), batch))
                (losses[-1] / MICRO).backward()
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
            if replicas == 1:
                recorder.log(loss=torch.stack(losses).mean(), stage=1)
