"""What fails inside the probe costs its metric, not the training; `strict=True` raises."""

import json

import pytest
import torch

import probes
from probes import gradient_taps, gradients, taps
from probes import recorder as recorder_module
from probes.manifest import END
from tests.probes.models import batches, decoder, loss_of, sgd, train


class Trouble(Exception):
    pass


def fail(*args, **kwargs):
    raise Trouble("no memory, say")


def losses(path=None, spoil=lambda recorder: None, **options):
    model = decoder("full", blocks=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    keep = lambda loss: seen.append(loss.item())  # noqa: E731
    if path is None:
        train(model, optimizer, 6, after=keep)
    else:
        with probes.record(
            model, path, optimizer=optimizer, every=1, matrices_every=1, **options
        ) as recorder:
            train(model, optimizer, 2, after=keep)
            spoil(recorder)
            train(model, optimizer, 4, start=2, after=keep)
    return seen


# Where something fails, and metrics that are lost by it.
SPOIL = {
    "a value": (taps, "add_moments", {"hidden_rms", "output_rms", "block_rms"}),
    "a gradient": (gradient_taps, "add_moments", {"hidden_grad_rms", "output_grad_rms", "block_grad_rms"}),
    "a count": (taps, "add_nonfinite", {"hidden_rms"}),
    "a norm": (gradients, "_squares", {"grad_norm", "param_grad_norm"}),
    "the copy": (recorder_module, "start_copy", {"grad_norm"}),
}


@pytest.mark.parametrize("what", SPOIL)
def test_training_goes_on_and_the_metric_is_missing(what, tmp_path, monkeypatch, caplog):
    module, name, lost = SPOIL[what]
    seen = losses(tmp_path / "run", lambda recorder: monkeypatch.setattr(module, name, fail))
    monkeypatch.undo()
    assert seen == losses()
    run = probes.open_run(tmp_path / "run")
    end = json.loads((tmp_path / "run" / END).read_text())
    assert end["status"] == "finished"
    for metric in lost:
        assert run.steps(metric).tolist() == [0, 1], metric
        assert end["missing"][metric] == {"step": 2, "cause": "Trouble: no memory, say"}
    if what != "the copy":
        others = {"param_norm", "depth_weight", "lr"} - set(end["missing"])
        assert others and all(run.steps(metric).tolist() == list(range(6)) for metric in others)
    messages = [r.getMessage() for r in caplog.records if r.name == "depthscope"]
    for metric in lost:
        assert sum(metric in text.split(" at step ")[0].replace(",", " ").split() for text in messages) == 1
    assert all("Trouble: no memory, say. Training goes on" in text for text in messages)


@pytest.mark.parametrize("what", SPOIL)
def test_strict_raises(what, tmp_path, monkeypatch):
    module, name, _ = SPOIL[what]
    with pytest.raises(Trouble):
        losses(tmp_path / "run", lambda recorder: monkeypatch.setattr(module, name, fail), strict=True)
    monkeypatch.undo()
    run = probes.open_run(tmp_path / "run")
    assert (run.status, run.status_reason) == ("stopped", "Trouble: no memory, say")
    assert run.steps("grad_norm").tolist() == [0, 1]


def test_what_works_again_is_recorded_again(tmp_path, monkeypatch):
    """One step without memory is one step without rows."""
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(model, optimizer, 1)
        with monkeypatch.context() as patch:
            patch.setattr(taps, "add_moments", fail)
            train(model, optimizer, 1, start=1)
        train(model, optimizer, 1, start=2)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 2]
    assert run.steps("grad_norm").tolist() == [0, 1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_that_cannot_be_found_leaves_nothing_unmasked(strict, tmp_path):
    model = decoder("full", blocks=1)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(
        model, tmp_path / "run", every=1, mask=lambda args, kwargs: kwargs["padding"], strict=strict
    ) as recorder:
        if strict:
            with pytest.raises(KeyError):
                model(tokens)
        else:
            loss_of(model(tokens), tokens).backward()
            recorder.step()
    if not strict:
        run = probes.open_run(tmp_path / "run")
        assert "grad_norm" in run and not {"hidden_rms", "output_grad_rms", "depth_weight"} & set(run.metrics)


def test_the_scripts_own_mistakes_are_its_own(tmp_path):
    with probes.record(decoder("prenorm", blocks=1), tmp_path / "run") as recorder:
        with pytest.raises(ValueError):
            recorder.log(loss="low")
        with pytest.raises(ValueError):
            recorder.log(hidden_rms=1.0)


@pytest.mark.parametrize(
    ("every", "since"), [(1, ""), (2, " All was finite at step 0, the last recorded before.")]
)
def test_the_first_layer_that_is_not_finite_is_told_once_with_its_step(every, since, tmp_path, caplog):
    model = decoder("prenorm")
    optimizer = sgd(model, 0.0)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=every, matrices_every=100):
        train(model, optimizer, 2)
        with torch.no_grad():
            model.blocks[1].mlp.output.weight[0, 0] = torch.inf
        train(model, optimizer, 3)
    told = [message for message in caplog.messages if "finite" in message]
    assert told == [
        "depthscope: at step 2 the output of layer 4 (MLP of transformer block 2) is not finite, the first seen in this run."
        + since
    ]
