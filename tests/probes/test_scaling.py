"""Scaled losses: recorded gradients are the true ones, or blank; skipped steps do not count."""

import copy

import numpy as np
import pytest
import torch

import probes
from probes.vocabulary import GRADIENTS
from tests.probes.models import batches, decoder, loss_of, sgd, wait_for
from tests.probes.test_silence import NoHostRead
from tests.probes.test_twin import expected_of

SIZES = ((2, 8), (1, 5))


def adam(model, fused):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def step(model, optimizer, scaler, number, clip=None, spoil=False):
    """One step of two micro-batches; `spoil` makes a gradient overflow."""
    optimizer.zero_grad()
    for tokens in batches(number, SIZES):
        loss = loss_of(model(tokens), tokens) / 3
        scaler.scale(loss * (torch.inf if spoil else 1)).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def check(run, expected, names=None):
    for s, numbers in expected.items():
        for name in names or numbers:
            if name in run:
                row = run.steps(name).tolist().index(s)
                np.testing.assert_allclose(run[name][row], numbers[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("told", [True, False])
def test_gradients_are_those_of_the_loss(fused, clip, told, tmp_path, caplog):
    model = decoder("full", blocks=1)
    optimizer, scaler = adam(model, fused), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    expected = {}
    options = {"scaler": scaler} if told else {}
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1, **options):
        for s in range(4):
            expected[s] = expected_of(model, batches(s, SIZES))
            if clip is None:
                expected[s]["clip_factor"] = 1
            step(model, optimizer, scaler, s, clip)
    run = probes.open_run(tmp_path / "run")
    assert scaler.get_scale() == 4096
    # A fused optimizer is told the scale, unless the script has divided by it already.
    known = told or (fused and clip is None)
    assert {name for name in GRADIENTS if name in run} == (set(GRADIENTS) if known else set())
    warned = [r.getMessage() for r in caplog.records if r.name == "depthscope"]
    assert len(warned) == (not known) and all("pass scaler=" in text for text in warned)
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3]
    check(run, expected)
    if told:
        assert run["skipped"].tolist() == [0, 0, 0, 0]


def test_a_skipped_attempt_does_not_count(tmp_path):
    model = decoder("full", blocks=1)
    optimizer, scaler = adam(model, fused=False), torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = {}
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1, matrices_every=1
    ):
        for number, spoil in enumerate([True, True, False, False, True, False]):
            s = {2: 0, 3: 1, 5: 2}.get(number)
            if s is not None:
                expected[s] = expected_of(model, batches(number, SIZES)) | {"clip_factor": 1}
            step(model, optimizer, scaler, number, spoil=spoil)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == run.steps("grad_norm").tolist() == [0, 1, 2]
    assert run["skipped"].tolist() == [2, 0, 1]
    check(run, expected)


def test_a_fused_optimizer_that_skips_keeps_the_step(tmp_path):
    """Its hooks run all the same; rows and logged scalars bear the true step."""
    model = decoder("full", blocks=1)
    optimizer, scaler = adam(model, fused=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected, losses = {}, {}
    spoiled = [True, False, False, True, True, False, False]
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1, matrices_every=1
    ) as recorder:
        for number, spoil in enumerate(spoiled):
            s = number - sum(spoiled[:number])
            if not spoil:
                expected[s] = expected_of(model, batches(number, SIZES)) | {"clip_factor": 1}
            step(model, optimizer, scaler, number, spoil=spoil)
            recorder.log(loss=number, tensor=torch.tensor(float(number)))
            losses.setdefault(s, []).append(number)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == run.steps("grad_norm").tolist() == [0, 1, 2, 3]
    check(run, expected)
    for name in ("loss", "tensor"):
        found = {}
        for s, value in zip(run.steps(name).tolist(), run[name].tolist(), strict=True):
            found.setdefault(s, []).append(value)
        assert found == losses
    skipped = np.bincount(run.steps("skipped"), run["skipped"])
    assert skipped.tolist() == [1, 0, 2, 0]


def test_a_look_in_vain_is_made_up_for(tmp_path):
    model = decoder("full", blocks=1)
    optimizer, scaler = adam(model, fused=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=50) as recorder:
        step(model, optimizer, scaler, 0, spoil=True)
        wait_for(lambda: recorder._retry or recorder._watch.mode)
        first = 1
        if not recorder._watch.mode:  # the host has known too late for this one
            step(model, optimizer, scaler, 1)
            first = 2
        expected = {first - 1: expected_of(model, batches(first, SIZES)) | {"clip_factor": 1}}
        for number in range(first, 5):
            step(model, optimizer, scaler, number)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == run.steps("depth_weight").tolist() == list(expected)
    check(run, expected)
    assert run.steps("skipped").tolist() == [0, first - 1]


def test_a_batch_that_the_script_gives_up_does_not_count(tmp_path):
    """Backward, then zero_grad without a step: with or without a scaler, and in place or not."""
    model = decoder("full", blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = {}
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=1):
        for s, to_none in enumerate([True, False]):
            for number in (10, 11, s):
                optimizer.zero_grad(set_to_none=to_none)
                for tokens in batches(number, SIZES):
                    (loss_of(model(tokens), tokens) / 3).backward()
            expected[s] = expected_of(model, batches(s, SIZES)) | {"clip_factor": 1}
            optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1]
    check(run, expected)


def test_without_an_optimizer_float16_autocast_needs_the_scaler(tmp_path, caplog):
    for path, options in (("run", {}), ("told", {"scaler": torch.amp.GradScaler("cpu", enabled=False)})):
        model = decoder("prenorm", blocks=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with probes.record(model, tmp_path / path, every=1, **options) as recorder:
            (tokens,) = batches(0, [(2, 8)])
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model(tokens).float(), tokens)
            loss.backward()
            optimizer.step()
            recorder.step()
        run = probes.open_run(tmp_path / path)
        assert "hidden_rms" in run and ("grad_norm" in run) == bool(options)
    assert sum("pass scaler=" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_no_number_is_read(fused, tmp_path):
    model = decoder("full", blocks=1)
    # On the CPU an Adam that is not fused reads its own step count.
    optimizer = adam(model, True) if fused else sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1, matrices_every=2
    ):
        for s in range(3):
            with NoHostRead():
                optimizer.zero_grad()
                (tokens,) = batches(s, [(2, 8)])
                scaler.scale(loss_of(model(tokens), tokens)).backward()
            if fused:
                with NoHostRead():
                    scaler.step(optimizer)
            else:
                # The scaler itself reads here whether to skip; the optimizer it then calls is ours to watch.
                update = optimizer.step
                with pytest.MonkeyPatch.context() as patch:

                    def quiet(*args, update=update, **kwargs):
                        with NoHostRead():
                            return update(*args, **kwargs)

                    patch.setattr(optimizer, "step", quiet)
                    scaler.step(optimizer)
            scaler.update()
    assert probes.open_run(tmp_path / "run").steps("grad_norm").tolist() == [0, 1, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_bit_identical(fused, tmp_path):
    model = decoder("full", blocks=1)
    trained = []
    for watched in (False, True):
        twin = copy.deepcopy(model)
        optimizer, scaler = adam(twin, fused), torch.amp.GradScaler("cpu", init_scale=1024.0)
        options = {"optimizer": optimizer, "scaler": scaler, "every": 1, "matrices_every": 2}
        recorder = probes.record(twin, tmp_path / "run", **options) if watched else None
        for s in range(4):
            step(twin, optimizer, scaler, s, clip=0.05, spoil=s == 1)
        if recorder is not None:
            recorder.close()
        trained.append([scaler.get_scale(), *(p.tolist() for p in twin.parameters())])
    assert trained[0] == trained[1]


def test_something_else_is_no_scaler(tmp_path):
    with pytest.raises(probes.RunError, match=r"scaler must be a torch\.amp\.GradScaler, not a float"):
        probes.record(decoder("full", blocks=1), tmp_path / "run", scaler=1024.0)
    assert not (tmp_path / "run").exists()
