"""Watching changes nothing: same bits, no host read, no node in the graph, no hook left behind."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import probes
from probes import recorder as recorder_module
from tests.probes.models import batches, decoder, hooks_on, loss_of, sgd, train

THREE = ["prenorm", "full", "block of 4, ragged"]


def record(model, path, optimizer=None, **options):
    return probes.record(model, path, optimizer=optimizer, **{"every": 1, "matrices_every": 2} | options)


# The same bits


@pytest.mark.parametrize("kind", THREE)
def test_eager_training_is_bit_identical(kind, tmp_path):
    losses = []
    models = []
    for watched in (False, True):
        model = decoder(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        seen = []
        if watched:
            with record(model, tmp_path / "run", optimizer):
                train(model, optimizer, 8, after=lambda loss, seen=seen: seen.append(loss.item()))
        else:
            train(model, optimizer, 8, after=lambda loss, seen=seen: seen.append(loss.item()))
        losses.append(seen)
        models.append(model.state_dict())
    assert losses[0] == losses[1]
    for name, parameter in models[0].items():
        assert torch.equal(parameter, models[1][name]), name


def chain(tensor):
    """Types of all autograd nodes behind a tensor, in order of a walk."""
    names, stack, seen = [], [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        stack.extend(node for node, _ in node.next_functions)
    return names


@pytest.mark.parametrize("kind", THREE)
def test_taps_insert_no_autograd_node(kind, tmp_path):
    model = decoder(kind)
    (tokens,) = batches(0, [(2, 8)])
    plain = chain(loss_of(model(tokens), tokens))
    with record(model, tmp_path / "run"):
        assert chain(loss_of(model(tokens), tokens)) == plain


# No read back to the host


class NoHostRead(TorchDispatchMode):
    """Fails on `.item()` and on every copy from another device to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number was read back to the host")
        return function(*args, **(kwargs or {}))


class NoUpload(TorchFunctionMode):
    """Fails where Python's numbers become a tensor on the device, as indexing with a list does: that copy is waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        indexes = args[1:] if function is torch.Tensor.__getitem__ else ()
        if any(
            isinstance(each, list) for each in tree_flatten(indexes, is_leaf=lambda x: isinstance(x, list))[0]
        ):
            raise AssertionError("a list of indexes is copied to the device")
        if function is torch.tensor and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu":
            raise AssertionError("numbers are copied to the device")
        return function(*args, **(kwargs or {}))


def host_free_step(model, optimizer, recorder, step):
    (tokens,) = [t.to(next(model.parameters()).device) for t in batches(step, [(2, 8)])]
    optimizer.zero_grad()
    loss = loss_of(model(tokens), tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    if recorder is not None:
        recorder.log(loss=loss)


@pytest.mark.parametrize("kind", THREE)
def test_no_number_is_read_in_a_recorded_step(kind, tmp_path):
    model = decoder(kind)
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer) as recorder, NoHostRead():
        for step in range(4):
            host_free_step(model, optimizer, recorder, step)
        recorder.now()
        host_free_step(model, optimizer, recorder, 4)
    run = probes.open_run(tmp_path / "run")
    assert run.steps("loss").tolist() == run.steps("hidden_rms").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", THREE)
def test_a_recorded_step_runs_without_any_numbers_at_all(kind, tmp_path, monkeypatch):
    """On the meta device tensors have no content: whatever reads one, or branches on one, raises."""
    copied = set()

    def start_copy(values):
        copied.update(key if isinstance(key, str) else key[0] for key in values)
        assert all(value.is_meta for value in values.values())
        return lambda: {key: np.ones(value.shape, np.float32) for key, value in values.items()}

    monkeypatch.setattr(recorder_module, "start_copy", start_copy)
    model = decoder(kind).to("meta")
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer) as recorder, NoUpload():
        for step in range(3):
            host_free_step(model, optimizer, recorder, step)
    assert {"hidden_rms", "output_grad_rms", "block_grad_rms", "grad_norm", "loss"} <= copied
    assert ("depth_weight" in copied) == (kind != "prenorm")
    assert probes.open_run(tmp_path / "run").steps("hidden_rms").tolist() == [0, 1, 2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_these_checks_can_fail(device):
    model = decoder("full").to(device)
    model.final_norm.register_forward_pre_hook(lambda m, args: args[0].norm().item() and None)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoHostRead():
        host_free_step(model, sgd(model), None, 0)


def test_an_upload_is_noticed():
    device = torch.device("meta")
    for upload in (
        lambda: torch.zeros(3, device=device)[[0, 2]],
        lambda: torch.zeros(3, 3, device=device)[:, [0, 2]],
        lambda: torch.tensor([0, 2], device=device),
    ):
        with pytest.raises(AssertionError, match="copied to the device"), NoUpload():
            upload()


def test_unrecorded_steps_touch_no_tensor(tmp_path):
    """Between looks nothing runs: a probed step has exactly the operations of a plain one."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    model = decoder("full")
    optimizer = sgd(model)
    with Count() as plain:
        host_free_step(model, optimizer, None, 1)
    with record(model, tmp_path / "run", optimizer, every=5, matrices_every=5) as recorder:
        host_free_step(model, optimizer, recorder, 0)
        host_free_step(model, optimizer, None, 1)  # tells the writer that step 0 is complete
        with Count() as watched:
            host_free_step(model, optimizer, None, 2)
    assert watched.operations == plain.operations


# What enters leaves


def test_close_takes_every_hook_off(tmp_path):
    model = decoder("block of 4, ragged")
    before = hooks_on(model)
    optimizer = sgd(model)
    recorder = record(model, tmp_path / "run", optimizer)
    assert hooks_on(model) > before
    train(model, optimizer, 1)
    recorder.close()
    recorder.close()
    assert hooks_on(model) == before == 0
    assert not optimizer._optimizer_step_post_hooks
    recorder.log(loss=1.0)
    recorder.now()
    train(model, optimizer, 2)
    assert probes.open_run(tmp_path / "run").last_step == 0


@pytest.mark.parametrize(
    "error", [ValueError("no more"), KeyboardInterrupt(), torch.OutOfMemoryError("full")]
)
def test_an_exception_takes_every_hook_off(error, tmp_path):
    model = decoder("full")
    optimizer = sgd(model)

    def fail(loss):
        raise error

    with pytest.raises(type(error)), record(model, tmp_path / "run", optimizer):
        train(model, optimizer, 1)
        train(model, optimizer, 1, after=fail)
    assert hooks_on(model) == 0
    run = probes.open_run(tmp_path / "run")
    assert (run.status, run.status_reason.partition(":")[0]) == ("stopped", type(error).__name__)
    assert run.last_step == 0


@pytest.mark.parametrize("code, status", [(None, "finished"), (0, "finished"), (3, "stopped")])
def test_leaving_by_sys_exit(code, status, tmp_path):
    model = decoder("full")
    with pytest.raises(SystemExit), record(model, tmp_path / "run"):
        raise SystemExit(code)
    assert probes.open_run(tmp_path / "run").status == status


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    model = decoder("full")
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(probes.RunError):
            record(model, path)
    with pytest.raises(probes.RunError, match="every is 0"):
        record(model, tmp_path / "run", every=0)
    with pytest.raises(probes.RunError, match="plain JSON values"):
        record(model, tmp_path / "run", config={"model": model})
    with pytest.raises(probes.RunError, match=r"not a torch\.optim\.Optimizer"):
        record(model, tmp_path / "run", optimizer=model)
    assert hooks_on(model) == 0 and not (tmp_path / "run").exists()


def test_a_forward_that_fails_leaves_nothing_behind(tmp_path):
    model = decoder("full")
    optimizer = sgd(model)
    with record(model, tmp_path / "run", optimizer) as recorder:
        handle = model.final_norm.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, 1)
        handle.remove()
        model.eval()(batches(0)[0])
        assert not recorder._watch.first.taps.depths._mean_squares


# Copies of the model


@pytest.mark.parametrize("kind", THREE)
def test_copies_and_pickles_are_not_recorded(kind, tmp_path):
    model = decoder(kind)
    optimizer = sgd(model)
    saved = io.BytesIO()
    with record(model, tmp_path / "run", optimizer) as recorder:
        twin = copy.deepcopy(model)
        torch.save(model, saved)
        loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
        pickled = pickle.loads(pickle.dumps(model))
        for other in (twin, loaded, pickled):
            train(other, sgd(other), 2)
            assert not recorder._watch.seen
        train(model, optimizer, 1)
    assert b"recorder" not in saved.getvalue() and b"writer" not in saved.getvalue()
    run = probes.open_run(tmp_path / "run")
    assert run.steps("hidden_rms").tolist() == [0]
    fresh = decoder(kind)
    with record(fresh, tmp_path / "alone", other := sgd(fresh)):
        train(fresh, other, 1)
    assert (probes.open_run(tmp_path / "alone")["hidden_rms"] == run["hidden_rms"]).all()


def test_a_gradient_is_read_once(tmp_path, monkeypatch):
    """That of a layer's output is that of the state after it, in a plain residual; the embedding is the first state."""
    from probes import gradient_taps

    calls = []
    real = gradient_taps.add_moments

    def counted(x, *rest):
        calls.append(x)
        real(x, *rest)

    model = decoder("prenorm", blocks=2)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run"):
        loss = loss_of(model(tokens), tokens)
        monkeypatch.setattr(gradient_taps, "add_moments", counted)
        loss.backward()
    assert len(calls) == 4 + 1  # layers, and the final state
