"""Pipelines whose stages are recorded as one model: cases of `ranks_at_work`, and the same training by one process."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

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


def cut(model: Model, index: int, count: int = 2) -> Model:
    """Stage `index`: of two the first has one block and the second three, of four each has one."""
    for i in range(BLOCKS):
        if min(i, count - 1) != index:
            del model.blocks[str(i)]
    if index > 0:
        model.embedding = None
    if index < count - 1:
        model.norm = model.head = None
    return model


def clip(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
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


ONE_STAGE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
TWO_STAGES = {"interleaved": ScheduleInterleaved1F1B, "looped": ScheduleLoopedBFS}


def run_stages(case: str, path: Path) -> None:
    """The schedule of two processes, with one stage in each or two, and then how the replicas of a stage are held together."""
    kind, beside = case.split("-")[:2]
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "stage"))
    place, replica = mesh["stage"].get_local_rank(), mesh["data"].get_local_rank()
    wrap, group = {"plain": plain, "ddp": ddp, "fsdp": fsdp}[beside], mesh["stage"].get_group()
    count = 4 if kind in TWO_STAGES else 2
    stages = [
        PipelineStage(wrap(cut(made(case), index, count), index, mesh), index, count, torch.device("cpu"), group=group)
        for index in range(place, count, 2)
    ]  # fmt: skip
    schedule = scheduled(kind, stages)
    optimizers = [sgd(stage.submod) for stage in stages]
    with probes.record(
        schedule, path, optimizer=optimizers, every=2, matrices_every=2, strict=True
    ) as recorder:
        for step in range(STEPS):
            losses = trained(schedule, optimizers, tokens(step, replica), place == 0, place == 1)
            if place and not replica:
                recorder.log(loss=torch.stack(losses).mean(), stage=1)


def scheduled(kind: str, stages: list[PipelineStage]):
    if kind in ONE_STAGE:
        return ONE_STAGE[kind](stages[0], MICRO, loss_fn=loss_of)
    return TWO_STAGES[kind](stages, MICRO, loss_fn=loss_of)


def trained(schedule, optimizers, batch: torch.Tensor, first: bool, last: bool) -> list[torch.Tensor]:
    """The losses of one step, by a process that has the first stage, or the last, or both."""
    losses: list[torch.Tensor] = []
    schedule.step(*([batch] if first else []), target=batch if last else None, losses=losses)
    for optimizer in optimizers:
        clip(p for group in optimizer.param_groups for p in group["params"])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses


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
            clip(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            if replicas == 1:
                recorder.log(loss=torch.stack(losses).mean(), stage=1)
