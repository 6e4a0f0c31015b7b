"""How far an update moves each layer, against the parameters themselves before and after, in float64."""

import numpy as np
import pytest
import torch

import probes
from probes.finding import find_sites
from probes.updates import SAMPLE, Updates
from tests.probes.models import batches, decoder, loss_of, sgd, train


def groups_of(model) -> list[list[torch.Tensor]]:
    return find_sites(model).layer_parameters()


def copied(groups) -> list[list[torch.Tensor]]:
    return [[p.detach().clone().double() for p in group] for group in groups]


def ratios(groups, before) -> np.ndarray:
    found = []
    for group, old in zip(groups, before, strict=True):
        moved = sum((p.detach().double() - o).square().sum() for p, o in zip(group, old, strict=True))
        found.append(float((moved / sum(o.square().sum() for o in old)).sqrt()))
    return np.array(found)


@pytest.mark.parametrize("kind", ["prenorm", "full"])
@pytest.mark.parametrize("several", [False, True])
def test_layers_that_fit_in_the_sample_are_exact(kind, several, tmp_path):
    model = decoder(kind)
    groups = groups_of(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    pair = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(vectors, lr=0.01)]
    if not several:
        pair = [torch.optim.AdamW(model.parameters(), lr=0.01)]
    expected = []
    with probes.record(model, tmp_path / "run", optimizer=pair, every=2, matrices_every=4):
        for step in range(5):
            before = copied(groups)
            for tokens in batches(step):
                loss_of(model(tokens), tokens).backward()
            for optimizer in pair:
                optimizer.step()
                optimizer.zero_grad()
            expected.append(ratios(groups, before))
    run = probes.open_run(tmp_path / "run")
    assert run.steps("update_ratio").tolist() == [0, 2, 4]
    np.testing.assert_allclose(run["update_ratio"], expected[::2], rtol=2e-4)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_larger_layers_are_estimated(make, tmp_path):
    torch.manual_seed(0)
    model = decoder("full", width=64)
    groups = groups_of(model)
    assert min(sum(p.numel() for p in group) for group in groups) > 2 * SAMPLE
    optimizer = make(model.parameters(), lr=0.01)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        before = copied(groups)
        train(model, optimizer, 1)
        expected = ratios(groups, before)
    np.testing.assert_allclose(probes.open_run(tmp_path / "run")["update_ratio"][0], expected, rtol=0.12)


def test_the_sample_is_spread_over_every_parameter_column_and_row():
    model = decoder("prenorm", width=128)
    updates = Updates(find_sites(model))
    count = updates._weight.view(len(groups_of(model)), -1)
    for row, group in enumerate(groups_of(model)):
        assert SAMPLE / 2 < int((count[row] > 0).sum()) <= 1.1 * SAMPLE
        assert float(count[row].square().sum()) == pytest.approx(sum(p.numel() for p in group), rel=1e-4)
    for parameter, stride in updates._sampled:
        if parameter.ndim == 2:
            places = torch.arange(0, parameter.numel(), stride)
            columns = (places % parameter.shape[1]).unique()
            assert len(columns) >= min(parameter.shape[1], len(places)) * 0.99
            assert places[-1] // parameter.shape[1] >= len(parameter) - 1 - stride / parameter.shape[1]


def test_a_layer_of_many_experts_looks_at_some():
    experts = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(300)]
    layers = type("Sites", (), {"layer_parameters": lambda self: [experts, []]})()
    updates = Updates(layers)
    assert len(updates._sampled) <= 64
    updates.before(0)
    with torch.no_grad():
        torch._foreach_mul_(experts, 1.5)
    ratio = updates.after(0)["update_ratio"]
    assert ratio[0] == pytest.approx(0.5) and ratio[1].isnan()


def test_steps_in_a_row_look_once(tmp_path, monkeypatch):
    """What one update ends with, the next begins with, but where somebody writes in between."""
    looks = []
    gathered = Updates._gathered
    monkeypatch.setattr(Updates, "_gathered", lambda self: looks.append(1) or gathered(self))
    model = decoder("prenorm", blocks=1)
    groups, optimizer, expected = groups_of(model), sgd(model, 0.1), []
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    torch._foreach_mul_(list(model.parameters()), 0.5)
            loss_of(model(tokens), tokens).backward()
            before = copied(groups)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(ratios(groups, before))
    assert len(looks) == 6  # before the first and the third, after each
    np.testing.assert_allclose(probes.open_run(tmp_path / "run")["update_ratio"], expected, rtol=2e-4)


def test_a_step_by_hand_through_data(tmp_path):
    model = decoder("prenorm", blocks=1)
    groups = groups_of(model)
    with probes.record(model, tmp_path / "run", every=1) as recorder:
        (tokens,) = batches(0, [(2, 8)])
        loss_of(model(tokens), tokens).backward()
        before = copied(groups)
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad
        recorder.step()
        expected = ratios(groups, before)
    np.testing.assert_allclose(probes.open_run(tmp_path / "run")["update_ratio"][0], expected, rtol=2e-4)


def test_a_closure_counts_from_where_its_step_began(tmp_path):
    model = decoder("prenorm", blocks=1)
    groups = groups_of(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    (tokens,) = batches(0, [(2, 8)])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(tokens), tokens)
        loss.backward()
        return loss

    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        before = copied(groups)
        optimizer.step(closure)
        expected = ratios(groups, before)
    np.testing.assert_allclose(probes.open_run(tmp_path / "run")["update_ratio"][0], expected, rtol=2e-4)


def test_frozen_layers_stand_still_and_updates_within_backward_are_not_known(tmp_path):
    model = decoder("prenorm", blocks=1)
    frozen = groups_of(model)[0]
    for parameter in frozen:
        parameter.requires_grad = False
    optimizer = sgd(model, 0.1)
    with probes.record(model, tmp_path / "frozen", optimizer=optimizer, every=1):
        train(model, optimizer, 1)
    ratio = probes.open_run(tmp_path / "frozen")["update_ratio"][0]
    assert ratio[0] == 0 < ratio[1]

    def update(parameter):
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(update)
    with probes.record(model, tmp_path / "within", every=1) as recorder:
        (tokens,) = batches(0, [(2, 8)])
        loss_of(model(tokens), tokens).backward()
        recorder.step()
    assert np.isnan(probes.open_run(tmp_path / "within")["update_ratio"]).all()


def test_an_update_that_a_scaler_skips_counts_with_the_one_after_it(tmp_path):
    model = decoder("prenorm", blocks=1)
    groups = groups_of(model)
    optimizer = sgd(model, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1):
        before = copied(groups)
        for factor in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(loss_of(model(tokens), tokens) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        expected = ratios(groups, before)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("update_ratio").tolist() == [0]
    np.testing.assert_allclose(run["update_ratio"][0], expected, rtol=2e-4)
