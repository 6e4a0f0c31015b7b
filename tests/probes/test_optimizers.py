"""Several optimizers, closures, and passes at other parameters: what belongs to a step."""

import copy

import numpy as np
import pytest
import torch

import probes
from tests.probes.models import batches, decoder, hooks_on, loss_of, sgd
from tests.probes.test_scaling import SIZES, check
from tests.probes.test_twin import expected_of


def evaluate(model, number):
    """Forward and backward of two micro-batches."""
    for tokens in batches(number, SIZES):
        loss = loss_of(model(tokens), tokens) / 3
        loss.backward()
    return loss


def expected_at(model, number) -> dict:
    return expected_of(model, batches(number, SIZES)) | {"clip_factor": 1}


def record(model, path, optimizer, **options):
    return probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, **options)


def two_groups(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.SGD(matrices, lr=0.01), torch.optim.AdamW(vectors, lr=0.01)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_two_groups_that_step_together(clip, tmp_path):
    model = decoder("full", blocks=1)
    pair = two_groups(model)
    expected = {}
    with record(model, tmp_path / "run", pair) as recorder:
        for s in range(3):
            expected[s] = expected_at(model, s)
            for optimizer in pair:
                optimizer.zero_grad()
            evaluate(model, s)
            if clip is not None:
                total = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                expected[s]["clip_factor"] = clip / (total.item() + 1e-6)
            for optimizer in pair:
                optimizer.step()
            recorder.log(loss=float(s))
    run = probes.open_run(tmp_path / "run")
    for name in ("hidden_rms", "grad_norm", "clip_factor", "loss"):
        assert run.steps(name).tolist() == [0, 1, 2]
    check(run, expected)
    np.testing.assert_allclose(run["lr"], 0.01)
    assert all(not o._optimizer_step_pre_hooks and not o._optimizer_step_post_hooks for o in pair)


def test_two_groups_under_one_scaler(tmp_path):
    """When the second steps, the scaler has divided the first one's gradients only a moment before its own."""
    model = decoder("full", blocks=1)
    pair, scaler = two_groups(model), torch.amp.GradScaler("cpu", init_scale=512.0)
    expected = {}
    with record(model, tmp_path / "run", pair, scaler=scaler):
        for s in range(2):
            expected[s] = expected_at(model, s)
            model.zero_grad()
            for tokens in batches(s, SIZES):
                scaler.scale(loss_of(model(tokens), tokens) / 3).backward()
            for optimizer in pair:
                scaler.step(optimizer)
            scaler.update()
    check(probes.open_run(tmp_path / "run"), expected)


def test_optimizers_that_take_turns(tmp_path):
    """A step is complete when each has stepped; its numbers are those of its first update."""
    model = decoder("full", blocks=1)
    pair = two_groups(model)
    expected = {}
    with record(model, tmp_path / "run", pair) as recorder:
        for number in range(4):
            if number % 2 == 0:
                expected[number // 2] = expected_at(model, number)
            model.zero_grad()
            evaluate(model, number)
            optimizer = pair[number % 2]
            optimizer.step()
            assert recorder._step == (number + 1) // 2
        pair[0].step()
        pair[0].step()  # again, so that the step before is over
        assert recorder._step == 3
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1]
    for numbers in expected.values():
        del numbers["clip_factor"]  # of one optimizer's part
    check(run, expected)


def closure_of(model, optimizer, number, evaluations):
    def closure():
        optimizer.zero_grad()
        loss = evaluate(model, number)
        evaluations.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_shows_the_evaluation_at_the_parameters_of_the_step(search, tmp_path):
    model = decoder("full", blocks=1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn=search)
    expected, evaluations = {}, []
    with record(model, tmp_path / "run", optimizer):
        for s in range(3):
            expected[s] = expected_at(model, s)
            optimizer.step(closure_of(model, optimizer, s, evaluations))
    assert len(evaluations) > 6
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == run.steps("grad_norm").tolist() == [0, 1, 2]
    assert "clip_factor" not in run
    check(run, expected)


def test_a_closure_evaluated_once(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected = {}
    with record(model, tmp_path / "run", optimizer):
        for s in range(3):
            expected[s] = expected_at(model, s)
            optimizer.step(closure_of(model, optimizer, s, []))
    check(probes.open_run(tmp_path / "run"), expected)


def test_a_closure_that_adds_the_last_of_several_passes(tmp_path):
    """As Lightning's, where gradients accumulate: the first pass has ended before the optimizer is asked to step."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    expected = {}
    with record(model, tmp_path / "run", optimizer):
        for s in range(2):
            expected[s] = expected_of(model, batches(s, SIZES))
            first, last = batches(s, SIZES)
            (loss_of(model(first), first) / 3).backward()

            def closure(last=last):
                loss = loss_of(model(last), last) / 3
                loss.backward()
                return loss

            optimizer.step(closure)
            optimizer.zero_grad()
    run = probes.open_run(tmp_path / "run")
    assert "clip_factor" not in run  # nobody shows what was done between backward and the update
    check(run, expected)


def test_a_pass_at_perturbed_parameters_does_not_count(tmp_path):
    """As in sharpness-aware minimisation: the second gradient is taken elsewhere."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    expected = {}
    with record(model, tmp_path / "run", optimizer):
        for s in range(2):
            expected[s] = expected_at(model, s)
            evaluate(model, s)
            with torch.no_grad():
                kept = [p.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.add_(0.1 * p.sign())
            optimizer.zero_grad()
            evaluate(model, s)
            with torch.no_grad():
                for p, old in zip(model.parameters(), kept, strict=True):
                    p.copy_(old)
            optimizer.step()
            optimizer.zero_grad()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0, 1] and "clip_factor" not in run
    check(run, expected)


@pytest.mark.parametrize("by", ["norm", "value", "data", "nothing"])
def test_clip_factor_is_what_became_of_the_norm(by, tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)

    def norm():
        return torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()

    with record(model, tmp_path / "run", optimizer):
        evaluate(model, 0)
        before = norm()
        if by == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.03)
        elif by == "value":
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.001)
        elif by == "data":
            for p in model.parameters():
                p.grad.data.mul_(0.25)
        after = norm()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run["clip_factor"], after / before, rtol=1e-5)
    np.testing.assert_allclose(run["grad_norm"], before, rtol=1e-5)
    assert (run["clip_factor"][0] == 1) == (by == "nothing")


def test_a_gradient_of_zero_is_not_clipped(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer):
        (loss_of(model(batches(0)[0]), batches(0)[0]) * 0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    assert run["clip_factor"].tolist() == [1] and run["grad_norm"].tolist() == [0]


def test_parameters_without_a_gradient(tmp_path):
    """A layer that is not used, and one that is frozen, beside those that learn."""
    model = decoder("prenorm", blocks=2)
    model.blocks[1].mlp.requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(3))
    model.blocks[0].mlp.extra = unused
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer):
        evaluate(model, 0)
        expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run["grad_norm"], [expected.item()], rtol=1e-6)
    norm_only = model.blocks[1].mlp_norm.weight
    assert norm_only.grad is not None and run["param_grad_norm"][0, 3] == pytest.approx(
        norm_only.grad.norm().item()
    )
    assert run["clip_factor"].tolist() == [1]


def test_several_forwards_before_one_backward(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    expected = expected_at(model, 0)
    with record(model, tmp_path / "run", optimizer):
        losses = [loss_of(model(tokens), tokens) / 3 for tokens in batches(0, SIZES)]
        sum(losses).backward()
        optimizer.step()
    check(probes.open_run(tmp_path / "run"), {0: expected})


def test_backwards_in_another_order_than_forwards(tmp_path):
    """And one forward that gets none."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    expected = expected_at(model, 0)
    with record(model, tmp_path / "run", optimizer):
        first, lost, second = [
            loss_of(model(tokens), tokens) / 3
            for tokens in (batches(0, SIZES)[0], batches(7)[0], batches(0, SIZES)[1])
        ]
        second.backward()
        first.backward()
        assert lost.grad_fn is not None
        optimizer.step()
    check(probes.open_run(tmp_path / "run"), {0: expected})


def test_a_step_without_any_backward_has_no_gradients(tmp_path):
    model = decoder("full", blocks=1)
    model.requires_grad_(False)
    with probes.record(model, tmp_path / "run", every=1) as recorder:
        model(batches(0)[0])
        recorder.step()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0]
    assert "grad_norm" not in run and "hidden_grad_rms" not in run


# A model that changes after it was attached


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_cast_after_attach(dtype, tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer):
        model.to(dtype)
        expected = expected_at(model, 0)
        evaluate(model, 0)
        optimizer.step()
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    run = probes.open_run(tmp_path / "run")
    for name in (
        "hidden_rms",
        "output_rms",
        "output_grad_rms",
        "param_grad_norm",
        "grad_norm",
        "depth_weight",
    ):
        found = run[name] if name != "depth_weight" else run.layout.pack(run[name])
        wanted = expected[name] if name != "depth_weight" else run.layout.pack(expected[name])
        np.testing.assert_allclose(found[0], wanted, rtol=tolerance, atol=1e-4 * tolerance, err_msg=name)


def test_a_model_moved_after_attach(tmp_path, monkeypatch):
    """The sums go with it; on the meta device anything left behind would raise."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer, strict=True) as recorder:
        evaluate(model, 0)
        optimizer.step()
        model.to("meta")
        fetched = []
        monkeypatch.setattr(
            "probes.recorder.start_copy", lambda values: fetched.append(values) or (lambda: 1 / 0)
        )
        recorder.step()  # the parameters are others now
        loss_of(model(batches(0)[0].to("meta")), batches(0)[0].to("meta")).backward()
        recorder.step()
        assert fetched[-1]["hidden_rms"].is_meta and fetched[-1]["grad_norm"].is_meta
        monkeypatch.undo()


def test_a_copy_is_not_recorded_in_the_middle_of_a_step(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    expected = expected_at(model, 0)
    with record(model, tmp_path / "run", optimizer):
        twin = copy.deepcopy(model)
        evaluate(twin, 5)
        evaluate(model, 0)
        evaluate(twin, 6)
        optimizer.step()
    check(probes.open_run(tmp_path / "run"), {0: expected})
    assert hooks_on(model) == 0


def test_gradients_that_are_gone_when_backward_ends_are_missing_not_zero(tmp_path, caplog):
    """An optimizer for each parameter, which steps within the backward pass and frees the gradient."""
    model = decoder("prenorm", blocks=1)
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    with probes.record(model, tmp_path / "run", optimizer=list(optimizers.values())):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        (tokens,) = batches(0, [(2, 8)])
        loss_of(model(tokens), tokens).backward()
    run = probes.open_run(tmp_path / "run")
    assert (
        "hidden_rms" in run.metrics
        and "grad_norm" not in run.metrics
        and "param_grad_norm" not in run.metrics
    )
    assert "the gradients were gone when the backward pass ended" in caplog.text
