"""Training scripts of others' making, for torchrun: `torchrun --nproc-per-node 2 -m tests.probes.ranks_trainers FOLDER`.

Hugging Face's Trainer records at FOLDER/trainer, Accelerate at FOLDER/accelerate, Lightning at FOLDER/lightning, and loops over a
model of Hugging Face's at FOLDER/sharded and FOLDER/sliced; the same on one process without torchrun.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import probes

SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BATCH, STEPS = 4, 3  # of all processes together


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE))


def texts() -> torch.Tensor:
    return torch.randint(64, (BATCH * STEPS, 8), generator=torch.Generator().manual_seed(1))


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained_by_hugging_face(folder: Path, world: int) -> None:
    rows = [{"input_ids": text, "labels": text} for text in texts()]
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH // world, learning_rate=0.01,
        lr_scheduler_type="constant", optim="sgd", report_to="none", use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = InOrder(llama(), arguments, train_dataset=rows)
    probes.attach(trainer, folder / "trainer", every=1, matrices_every=1, strict=True)
    trainer.train()


def trained_by_accelerate(folder: Path) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    rank, world = accelerator.process_index, accelerator.num_processes
    with probes.record(
        model, folder / "accelerate", optimizer=optimizer, every=1, matrices_every=2, strict=True
    ) as recorder:
        for batch in texts().chunk(2 * STEPS):
            with accelerator.accumulate(model):
                part = batch.chunk(world)[rank]
                loss = model(input_ids=part, labels=part).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                recorder.log(loss=loss)


def trained_by_lightning(folder: Path, world: int) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama()

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    probes.attach(trainer, folder / "lightning", every=1, matrices_every=1, strict=True)
    rank = trainer.global_rank
    mine = [part.chunk(world)[rank] for part in texts().chunk(STEPS)]
    trainer.fit(Module(), torch.utils.data.DataLoader(mine, batch_size=None))


def trained_by_a_loop(folder: Path, how: str, world: int) -> None:
    """A model of Hugging Face's under `fully_shard`, or sliced by its own plan."""
    model = llama()
    if world > 1 and how == "sliced":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        if dist.get_rank() == 0:
            model.save_pretrained(folder / "llama")
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(folder / "llama", tp_plan="auto", device_mesh=mesh).train()
    elif world > 1:
        for module in (*model.model.layers, model):
            fully_shard(module)
    parts, part = (world, dist.get_rank()) if world > 1 and how == "sharded" else (1, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with probes.record(
        model, folder / how, optimizer=optimizer, every=1, matrices_every=1, strict=True
    ) as recorder:
        for batch in texts().chunk(STEPS):
            mine = batch.chunk(parts)[part]
            loss = model(input_ids=mine, labels=mine).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=loss)


if __name__ == "__main__":
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    trained_by_hugging_face(folder, world)
    trained_by_accelerate(folder)
    trained_by_lightning(folder, world)
    for how in ("sharded", "sliced"):
        trained_by_a_loop(folder, how, world)
