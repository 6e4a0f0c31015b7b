"""The cost of recording: everything is left as it was, and the figures add up. The times are nobody's business here."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.cost import Cost
from probes.schedule import log_spaced, schedule
from probes.unchanged import unchanged
from tests.probes.models import batches, decoder, hooks_on, loss_of, sgd, train

(TOKENS,) = batches(0, [(2, 8)])


class Restless(nn.Module):
    """Wraps a model: draws from every generator and changes a buffer, one in place and one by another tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.full((3,), 7.0), persistent=False)

    def forward(self, tokens):
        self.seen += tokens.numel() + int(random.random() < 2)
        self.last = torch.rand(5) + np.random.rand()
        return self.model(tokens)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All that must not change, copied."""
    return copy.deepcopy(
        {
            "parameters": dict(model.named_parameters()),
            "buffers": dict(model.named_buffers()),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "modes": {name: module.training for name, module in model.named_modules()},
            "optimizer": optimizer.state_dict(),
            "random": (torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1:]),
        }
    )


@pytest.mark.parametrize("given", ["own optimizer", "no optimizer", "an error"])
def test_everything_is_left_as_it_was(given):
    model = Restless(decoder(blocks=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    train(model, optimizer, 2)
    loss_of(model(TOKENS), TOKENS).backward()
    model.eval()
    model.model.blocks[0].train()
    before, hooks = state_of(model, optimizer), hooks_on(model)
    gradients = [id(p.grad) for p in model.parameters()]
    if given == "an error":
        with pytest.raises(
            probes.RunError, match="training step of Restless failed: IndexError: pop from empty list"
        ):
            weights = [3, 2, 1]  # for three steps
            probes.bench(
                model, TOKENS, optimizer=optimizer, loss=lambda out: out.mean() * weights.pop(), pairs=1
            )
    else:
        probes.bench(model, TOKENS, optimizer=optimizer if given == "own optimizer" else None, pairs=1)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0, equal_nan=True)
    assert hooks_on(model) == hooks and [id(p.grad) for p in model.parameters()] == gradients
    assert not optimizer._optimizer_step_post_hooks


def test_without_putting_back_it_would_have_changed():
    """The check above can fail: the same steps outside `unchanged` leave nothing as it was."""
    model = Restless(decoder(blocks=1))
    optimizer = sgd(model)
    before = state_of(model, optimizer)
    with unchanged(model, optimizer):
        train(model, optimizer, 1)
        within = state_of(model, optimizer)
    for part in ("parameters", "buffers", "gradients"):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(within[part], before[part], rtol=0, atol=0)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)


def made(**changes) -> Cost:
    """A cost of round numbers."""
    figures = {
        "model": "Decoder",
        "parameters": 1_000_000,
        "model_bytes": 4_000_000,
        "probe_bytes": 2_000,
        "machine": "cpu with 2 threads",
        "compiled": False,
        "every": schedule(10),
        "matrices_every": schedule(100),
        "seconds": {
            "unrecorded": [1.0, 2.0, 1.0, 1.0, 1.0],
            "vectors": [1.01, 2.04, 1.03, 1.04, 1.05],
            "matrices": [1.1, 2.2, 1.1, 1.1, 1.1],
        },
        "hook_calls": 100,
        "seconds_per_call": 1e-6,
    }
    return Cost(**figures | changes)


def test_the_figures_add_up():
    cost = made()
    assert cost.pairs == 5 and cost.step == pytest.approx((1, 1, 1))
    assert cost.vectors == pytest.approx((0.02, 0.03, 0.04)) and cost.matrices.median == pytest.approx(0.1)
    assert cost.unrecorded == pytest.approx(1e-4)
    # 90 of 1000 steps record vectors alone, 10 record both.
    assert cost.amortised == pytest.approx([1e-4 + 0.09 * v + 0.01 * 0.1 for v in (0.02, 0.03, 0.04)])
    dense = made(
        every=schedule([range(1000), 10]), matrices_every=log_spaced(1)
    )  # of 10,000: 0, 1, 10, 100, 1000
    assert dense.amortised.median == pytest.approx(1e-4 + (1900 - 5) / 1e4 * 0.03 + 5 / 1e4 * 0.1)
    assert made(matrices_every=schedule(1)).amortised.median == pytest.approx(1e-4 + 0.1)


def test_the_table():
    assert str(made()).splitlines() == [
        "Decoder, 1,000,000 parameters, eager, cpu with 2 threads, 5 pairs",
        "An unrecorded step takes 1000 ms (quartiles 1000 – 1000). Recording adds:",
        "                            median   quartiles",
        "a step with vectors        +3.00 %   +2.00 – +4.00 %",
        "a step with matrices      +10.00 %   +10.00 – +10.00 %",
        "an unrecorded step       +0.0100 %   100 hook calls × 1.00 µs",
        "amortised                 +0.380 %   +0.290 – +0.470 %   vectors every 10 steps, matrices every 100 steps",
        "memory held                   2 kB   0.05 % of the parameters' 4 MB",
    ]


def test_what_is_counted(tmp_path):
    """Of each kind as many steps as pairs; each hook once; the bytes of the sums, as the architecture gives them."""
    model = decoder("full", blocks=1)
    before = hooks_on(model)
    cost = probes.bench(model, TOKENS, pairs=7)
    assert {kind: len(times) for kind, times in cost.seconds.items()} == dict.fromkeys(cost.seconds, 7)
    assert all(time > 0 for times in cost.seconds.values() for time in times)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.model_bytes == 4 * cost.parameters
    assert cost.probe_bytes == probes.describe(model).probe_bytes > 0
    assert cost.seconds_per_call > 0 and hooks_on(model) == before
    with probes.record(model, tmp_path / "run", optimizer=sgd(model)):
        assert cost.hook_calls == hooks_on(model) - before + 1  # and the optimizer's


def test_each_recorded_step_was_one(monkeypatch, tmp_path):
    """The steps timed as recorded are those that the run holds."""
    from probes import benching

    monkeypatch.setattr(benching.tempfile, "TemporaryDirectory", lambda: _Kept(tmp_path))
    probes.bench(decoder("full", blocks=1), TOKENS, pairs=8)
    run = probes.open_run(tmp_path / "run")
    kinds = [*benching._WARM_UP, *benching._rounds(8)]
    assert run.steps("depth_weight").tolist() == [s for s, kind in enumerate(kinds) if kind == "matrices"]
    assert run.steps("hidden_rms").tolist() == [s for s, kind in enumerate(kinds) if kind != "unrecorded"]


class _Kept:
    def __init__(self, path):
        self._path = path

    def __enter__(self):
        return str(self._path)

    def __exit__(self, *error):
        pass


class Answer(nn.Module):
    """A model whose output and arguments come in the form a test asks for."""

    def __init__(self, form):
        super().__init__()
        self.model, self.form = decoder("prenorm", blocks=1), form

    def forward(self, tokens, *, scale=1.0):
        return self.form(self.model(tokens) * scale)


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: logits.mean(),
        lambda logits: (logits, "more"),
        lambda logits: {"logits": logits},
        lambda logits: {"loss": logits.sum(), "logits": logits},
        lambda logits: type("Output", (), {"loss": logits.sum(), "logits": None})(),
    ],
)
@pytest.mark.parametrize("batch", [TOKENS, (TOKENS,), {"tokens": TOKENS, "scale": 2.0}])
def test_outputs_and_batches_of_every_form(form, batch):
    assert probes.bench(Answer(form), batch, pairs=1).pairs == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": 0}, "pairs is 0: give a whole number, 1 or more."),
        ({"every": 0}, "every is 0: give a whole number of steps"),
        ({"matrices_every": [5, 10]}, "matrices_every is .5, 10.: a list holds one interval at most"),
        ({"model": 3}, "A model of type int is not a torch.nn.Module"),
        ({"model": nn.Linear(2, 2)}, "No transformer layers were found in Linear"),
        ({"batch": torch.zeros(2, 3)}, "A training step of Answer failed: ValueError: tokens must be "),
        (
            {"loss": lambda out: out},
            "A training step of Answer failed: RuntimeError: grad can be implicitly created",
        ),
        (
            {"model": Answer(lambda logits: "text")},
            "output is of type str: give loss=, a function that makes a",
        ),
        (
            {"model": Answer(lambda logits: logits).requires_grad_(False)},
            "No parameter of Answer requires a grad",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(options, said):
    given = {"model": Answer(lambda logits: logits), "batch": TOKENS, "pairs": 1} | options
    with pytest.raises(probes.RunError, match=said) as raised:
        probes.bench(given.pop("model"), given.pop("batch"), **given)
    assert "\n" not in str(raised.value)


@pytest.mark.long
def test_compiled_and_forgotten_afterwards(tmp_path):
    """A graph that remembered the bench's hooks would make a later recording blind."""
    model = decoder("prenorm", blocks=1)
    cost = probes.bench(model, TOKENS, compile=True, pairs=1)
    assert cost.compiled and "compiled" in str(cost)
    assert cost.hook_calls < probes.bench(model, TOKENS, pairs=1).hook_calls
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(torch.compile(model, backend="aot_eager"), optimizer, 1)
    assert np.isfinite(probes.open_run(tmp_path / "run")["hidden_rms"]).all()


def test_the_layers_may_be_chosen_as_for_a_recording():
    with pytest.raises(probes.RunError, match="nowhere"):
        probes.bench(decoder(blocks=1), TOKENS, pairs=1, stack="nowhere")
    assert probes.bench(decoder(blocks=1), TOKENS, pairs=1, stack="blocks").pairs == 1
