"""Trainers that own the loop: the run is that of their training, and their training is what it was without."""

import functools
import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import probes
from attnres import Decoder, DecoderConfig
from probes import marks
from tests.probes.models import batches, decoder, hooks_on, loss_of, sgd
from tests.probes.test_twin import expected_of

ALL = {"every": 1, "matrices_every": 2}


class Texts(torch.utils.data.Dataset):
    """Twenty texts of eight tokens; whoever asks for a tenth one meets `wrong`."""

    def __init__(self, wrong: BaseException | None = None):
        self.wrong, self.asked = wrong, 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.asked += 1
        if self.wrong is not None and self.asked == 10:
            raise self.wrong
        tokens = torch.randint(1, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


# Hugging Face


@pytest.fixture
def trainer(tmp_path):
    """A function that makes a Trainer of four steps of two micro-batches of two texts; its keywords are arguments."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

    def make(texts=None, **arguments):
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=64, attention_dropout=0.1, **size)
        )
        settings = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1,
            "max_grad_norm": 0.1, "save_strategy": "no",
        }  # fmt: skip
        arguments = transformers.TrainingArguments(**settings | arguments)
        return transformers.Trainer(model, arguments, train_dataset=texts or Texts(), eval_dataset=Texts())

    return make


def test_hugging_face(trainer, tmp_path):
    plain, watched = (
        trainer(eval_strategy="steps", eval_steps=2),
        trainer(eval_strategy="steps", eval_steps=2),
    )
    probes.attach(watched, tmp_path / "run", tags="mine", **ALL)
    hooks = hooks_on(watched.model)
    for each in (plain, watched):
        torch.manual_seed(0)  # of the dropout
        each.train()
    for mine, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert hooks_on(watched.model) == hooks and not marks._listening

    run = probes.open_run(tmp_path / "run")
    assert run.status == "finished" and run.tags == ("mine",) and run.config["hidden_size"] == 16
    trained = [row for row in plain.state.log_history if "loss" in row]
    assert run.steps("hidden_rms").tolist() == run.steps("loss").tolist() == [0, 1, 2, 3]
    for name, its in (("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "learning_rate")):
        np.testing.assert_allclose(run[name], [row[its] for row in trained], rtol=1e-5)
    np.testing.assert_allclose(run["clip_factor"], 0.1 / run["grad_norm"], rtol=1e-4)
    evaluated = [row["eval_loss"] for row in plain.state.log_history if "eval_loss" in row]
    assert run.steps("val_loss").tolist() == [1, 3]
    np.testing.assert_allclose(run["val_loss"], evaluated, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong", [RuntimeError("a broken text"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_hugging_face_stopped(wrong, trainer, tmp_path):
    its = trainer(Texts(wrong))
    probes.attach(its, tmp_path / "run", **ALL)
    with pytest.raises(type(wrong)):
        its.train()
    run = probes.open_run(tmp_path / "run")
    assert run.status == "stopped" and run.status_reason.startswith(type(wrong).__name__)
    its.train_dataset = Texts()
    its.train()
    again = probes.open_run(tmp_path / "run-2")
    assert again.status == "finished" and again.steps("grad_norm").tolist() == [0, 1, 2, 3]


def test_hugging_face_resumed(trainer, tmp_path):
    first = trainer(save_strategy="steps", save_steps=2)
    probes.attach(first, tmp_path / "run", **ALL)
    first.train()
    second = trainer()
    probes.attach(second, tmp_path / "run", **ALL)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    run = probes.open_run(tmp_path / "run")
    assert run.status == "finished" and run.steps("hidden_rms").tolist() == [0, 1, 2, 3]
    trained = [row["grad_norm"] for row in second.state.log_history if "loss" in row]
    np.testing.assert_allclose(run["grad_norm"], trained, rtol=1e-5)


# Accelerate


@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate(scaled, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # what other tests left behind
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = decoder("full", blocks=1)
    model, optimizer = accelerator.prepare(model, sgd(model))
    sizes = [(2, 8), (1, 5)]
    with probes.record(model, tmp_path / "run", optimizer=optimizer, **ALL) as recorder:
        for step in range(2):
            expected = expected_of(model, batches(step, sizes))
            for tokens in batches(step, sizes):
                with accelerator.accumulate(model):
                    loss = loss_of(model(tokens), tokens)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
                    recorder.log(loss=loss)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("grad_norm").tolist() == [0, 1] and len(run["loss"]) == 4
    # Accelerate divides the loss by the number of micro-batches, 2, and the twin by 3.
    for name, factor in (("grad_norm", 3 / 2), ("output_grad_rms", 3 / 2), ("hidden_rms", 1)):
        np.testing.assert_allclose(run[name][1], expected[name] * factor, rtol=1e-4, atol=1e-7, err_msg=name)
    # It knows of no float16 here, so what it clips is still scaled.
    clipped = 0.1 / run["grad_norm"] / (1024 if scaled else 1)
    np.testing.assert_allclose(run["clip_factor"], clipped, rtol=1e-4)


# Lightning


def lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pytest.importorskip("lightning", reason="lightning is not installed")


@functools.cache
def module_class():
    class Module(lightning().LightningModule):
        """The model inside, which `training_step` calls by itself; a parameter beside it."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = Decoder(
                DecoderConfig(vocabulary=64, width=16, blocks=2, heads=2, context=8, residual="full")
            )
            self.gain = torch.nn.Parameter(torch.ones(()))
            self.norms = []

        def loss(self, batch):
            tokens = batch["input_ids"]
            return F.cross_entropy(self.gain * self.model(tokens).flatten(0, 1), tokens.flatten())

        def training_step(self, batch, index):
            loss = self.loss(batch)
            self.log("bits", loss.detach() / 0.6931)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.loss(batch))

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module


def fit(texts=None, path=None, module=None, **settings):
    usual = {
        "max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "accelerator": "cpu", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "val_check_interval": 4, "limit_val_batches": 2,
    }  # fmt: skip
    trainer = lightning().Trainer(**usual | settings)
    if path is not None:
        probes.attach(trainer, path, **ALL)
    module = module or module_class()()
    load = functools.partial(torch.utils.data.DataLoader, batch_size=2)
    trainer.fit(module, load(texts or Texts()), load(Texts()))
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning()
    plain, watched = fit(), fit(path=tmp_path / "run")
    for mine, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert hooks_on(watched) == hooks_on(plain) and not marks._listening
    run = probes.open_run(tmp_path / "run")
    assert run.status == "finished" and run.config["width"] == 16
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3] and np.isfinite(run["hidden_rms"]).all()
    # Of both micro-batches, before clipping, the gain beside the model too.
    np.testing.assert_allclose(run["grad_norm"], plain.norms, rtol=1e-5)
    assert run.steps("loss").tolist() == run.steps("bits").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_allclose(run["loss"], run["bits"] * 0.6931, rtol=1e-5)
    assert run.steps("val_loss").tolist() == [1, 3] and (run["lr"] == np.float32(1e-3)).all()
    assert "clip_factor" not in run  # Lightning runs backward inside the optimizer's step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrong", [RuntimeError("a broken text"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_lightning_stopped(wrong, tmp_path):
    lightning()
    with pytest.raises((type(wrong), SystemExit)):
        fit(Texts(wrong), tmp_path / "run")
    run = probes.open_run(tmp_path / "run")
    assert run.status == "stopped" and run.status_reason.startswith(type(wrong).__name__)


# Anything else


def test_what_is_no_trainer_is_refused(tmp_path):
    with pytest.raises(probes.RunError, match=r"A Decoder is not a Trainer .* call probes.record"):
        probes.attach(decoder("full", blocks=1), tmp_path / "run")


def test_an_optimizer_without_one_inside_is_refused(tmp_path):
    class Empty(torch.optim.Optimizer):
        def __init__(self):
            pass

    with pytest.raises(probes.RunError, match=r"not a torch\.optim\.Optimizer"):
        probes.record(decoder("full", blocks=1), tmp_path / "run", optimizer=Empty())
