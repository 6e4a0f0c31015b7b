"""Training: it learns, it takes turns, it can be watched, and it keeps to its schedule."""

import pytest
import torch

from attnres import Corpus, Training, TrainingConfig
from tests.attnres.models import RESIDUALS, small_config

KINDS = ["prenorm", "full", "block of 4, ragged"]
CORPUS = Corpus(
    "rhyme", {"a": b"the cat sat on the mat and that was that. " * 40, "b": b"the cat sat. " * 40}
)


def training(kind="full", **changes):
    config = {
        "steps": 12,
        "batch": 4,
        "context": 8,
        "lr": 1e-2,
        "warmup": 2,
        "validation_batches": 2,
    } | changes
    return Training(small_config(vocabulary=256, **RESIDUALS[kind]), TrainingConfig(**config), CORPUS)


def losses(one, steps=4):
    return [one.step().item() for _ in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_reduce_the_loss(kind):
    one = training(kind)
    before = one.validate()
    losses(one, 12)
    assert one.validate() < before - 1


def test_in_turn_is_the_same_as_alone():
    alone = [losses(training(kind)) for kind in KINDS]
    together = [training(kind) for kind in KINDS]
    in_turn = [[one.step().item() for one in together] for _ in range(4)]
    assert alone == [list(column) for column in zip(*in_turn, strict=True)]


def test_validation_changes_nothing():
    watched, plain = training(), training()
    values = []
    for _ in range(4):
        values.append(watched.step().item())
        watched.validate()
        assert watched.model.training
    assert values == losses(plain)
    assert watched.validate() == watched.validate()


def test_validation_runs_in_eval_mode_and_without_gradients():
    one, modes = training(), []
    one.model.register_forward_hook(lambda m, args, out: modes.append((m.training, out.requires_grad)))
    one.validate()
    assert set(modes) == {(False, False)}


def test_the_mode_comes_back_even_from_an_error(monkeypatch):
    one = training()
    monkeypatch.setattr(one.corpus, "validation_batches", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.validate()
    assert one.model.training


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training().step()
    assert torch.equal(torch.rand(3), expected)


def test_hooks_from_outside_see_every_step():
    one, forwards, steps = training(), [], []
    one.model.residual.reads[-1].register_forward_hook(lambda m, args, out: forwards.append(len(args[0])))
    one.optimizer.register_step_post_hook(lambda *_: steps.append(one.steps_done))
    losses(one, 3)
    assert forwards == [7, 7, 7]
    assert steps == [0, 1, 2]


def test_the_loss_is_a_detached_tensor_and_gradients_are_clipped():
    one = training(clip=0.01)
    loss = one.step()
    assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float32, False)
    norm = torch.stack([p.grad.norm() for p in one.model.parameters()]).norm()
    assert one.grad_norm > 0.1
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_warms_up_and_comes_down():
    one = training(steps=10, warmup=4, lr=1.0, lr_end=0.1)
    rates = []
    for _ in range(12):
        rates.append(one.lr)
        one.scheduler.optimizer.step()
        one.scheduler.step()
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.55)
    assert rates[10:] == pytest.approx([0.1, 0.1])


def test_bfloat16_trains_and_keeps_float32_parameters():
    one = training(dtype="bfloat16")
    values = losses(one, 8)
    assert values[-1] < values[0]
    assert values[0] == pytest.approx(training().step().item(), rel=1e-2)
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}


@pytest.mark.long
def test_a_compiled_training_is_the_same_training():
    torch._dynamo.reset()
    assert losses(training(compile=True)) == pytest.approx(losses(training()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 1.5}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"warmup": -1}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"dtype": "float8"}, "dtype"),
        ({"context": 9}, "context"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_that_names_the_field(changes, field):
    with pytest.raises(ValueError, match=rf"^{field} [^\n]*\.$"):
        training(**changes)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary must be at least 256"):
        Training(small_config(), TrainingConfig(context=8), CORPUS)
