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

import probes
from tests.probes import ranks_failing, ranks_stages, ranks_uneven  # noqa: F401  their scenes are played
from tests.probes.foreign import Foreign
from tests.probes.models import decoder, loss_of
from tests.probes.ranks_scenes import PLAYED, free_port, play
from tests.probes.ranks_spread import SPREAD

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


def made(case: str) -> nn.Module:
    if "experts" in case or "plain" in case:
        return ranks_stages.made(case)
    if "found" in case:
        return Foreign("list", width=8)
    kind = "prenorm" if "sp" in case.split("-")[0].split("_") else "full"
    heads = 4 if "4" in case else 2
    kind = "block of 2" if "block" in case else kind
    blocks = 1 if "compiled" in case or "inductor" in case else 2
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
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if "scaled" in case else None
    with probes.record(
        recorded,
        path,
        optimizer=optimizer,
        scaler=scaler,
        every=1,
        matrices_every=2,
        strict=True,
        **options,
    ) as recorder:
        for step in range(STEPS):
            for micro in range(micro_batches):
                with _without_sync(model, micro == micro_batches - 1):
                    total = _total(case, model, step, parts, world, micro, micro_batches)
                    (total if scaler is None else scaler.scale(total)).backward()
            ranks_stages.clip(model.parameters())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
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
