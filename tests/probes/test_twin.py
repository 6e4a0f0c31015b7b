"""Every recorded number against its twin: the float64 definition and plain autograd on a copy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

import probes
from probes.expert_taps import EXPERT_METRICS
from probes.sampled import SAMPLED_METRICS
from probes.vocabulary import METRICS
from tests.attnres.models import defined_pass
from tests.probes.models import KINDS, batches, decoder, loss_of, sgd, train

CLIP = 0.05
DEPTH = {"depth_weight", "depth_weight_std", "contribution_rms", "depth_entropy", "depth_entropy_of_mean"}
MATRICES = DEPTH | {"nonfinite", "param_norm", "depth_attribution"}
HOST = {"wall_time", "step_time", "probe_time"}  # clocks have no twin
MATRICES_EVERY = 2


def expected_of(model, micro_batches) -> dict[str, np.ndarray]:
    """The metrics of one step, before its update."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    passes = [Pass(twin, tokens) for tokens in micro_batches]
    return (
        activations(twin, passes)
        | gradient_norms(twin)
        | {"depth_attribution": attribution(twin, passes)}
        | (depth(twin, passes) if twin.config.residual != "prenorm" else {})
    )


class Pass:
    """One micro-batch through the definition, with the gradient at every place of interest."""

    def __init__(self, twin, tokens):
        self.embedding = twin.embedding(tokens)
        depth_pass = defined_pass(twin, self.embedding)
        self.outputs = [self.embedding, *depth_pass.outputs]
        self.states = [*depth_pass.states, depth_pass.final_state]
        self.weights = depth_pass.weights
        loss = loss_of(twin.head(twin.final_norm(depth_pass.final_state)), tokens) / 3
        places = [*self.states, *self.outputs]
        gradients = torch.autograd.grad(loss, places, retain_graph=True)
        loss.backward()
        self.state_gradients = list(gradients[: len(self.states)])
        self.output_gradients = list(gradients[len(self.states) :])
        self.mix_gradients = self.state_gradients  # of a plain residual those of the branches
        if twin.config.residual == "prenorm":
            # The definition sums each state anew; a running sum carries every later path too.
            paths = itertools.accumulate(reversed(self.state_gradients))
            self.state_gradients = list(paths)[::-1]


def activations(twin, passes) -> dict[str, np.ndarray]:
    last = range(2, twin.config.layers + 1, 2)  # the MLP of each transformer block
    blocks = {
        "prenorm": lambda p: [p.states[layer] for layer in last],
        "full": lambda p: [p.outputs[layer] for layer in last],
        "block": lambda p: [sources_of(twin, p.outputs[: layer + 1])[-1] for layer in last],
    }[twin.config.residual]
    return {
        "hidden_rms": rows(passes, lambda p: p.states),
        "nonfinite": np.zeros(twin.config.layers + 1),
        "output_rms": rows(passes, lambda p: p.outputs),
        "block_rms": rows(passes, blocks),
        "hidden_grad_rms": rows(passes, lambda p: p.state_gradients),
        "output_grad_rms": rows(passes, lambda p: p.output_gradients),
        # What the MLP adds reaches the loss only through what leaves its block.
        "block_grad_rms": rows(passes, lambda p: [p.output_gradients[layer] for layer in last]),
    }


def rows(passes, tensors_of) -> np.ndarray:
    """RMS of each tensor over all tokens of all micro-batches."""
    alike = zip(*map(tensors_of, passes), strict=True)
    return np.array([torch.cat([t.detach().flatten() for t in row]).square().mean().sqrt() for row in alike])


def sources_of(twin, outputs):
    """The sources of the read that comes after `outputs`, from the embedding on."""
    embedding, *outputs = outputs
    size = twin.config.layers_per_block or 1
    return [embedding, *(sum(outputs[i : i + size]) for i in range(0, len(outputs), size))]


@torch.no_grad()
def depth(twin, passes) -> dict[str, np.ndarray]:
    reads = twin.config.layers + 1
    shape = (reads, len(passes[0].weights[-1]))
    out = {name: np.full(shape if "entropy" not in name else reads, np.nan) for name in DEPTH}
    for row in range(reads):
        weight = torch.cat([p.weights[row].flatten(1) for p in passes], 1)
        values = [torch.stack(sources_of(twin, p.outputs[: row + 1])).flatten(1, 2) for p in passes]
        parts = weight.unsqueeze(-1) * torch.cat(values, 1)
        sources = len(weight)
        out["depth_weight"][row, :sources] = weight.mean(1)
        out["depth_weight_std"][row, :sources] = weight.std(1, correction=0)
        out["contribution_rms"][row, :sources] = parts.square().mean((1, 2)).sqrt()
        if sources > 1:
            out["depth_entropy"][row] = entropy(weight).mean() / math.log(sources)
            out["depth_entropy_of_mean"][row] = entropy(weight.mean(1)) / math.log(sources)
    out["query_norm"] = np.array([(read.query * read.gain).norm().item() for read in twin.residual.reads])
    return out


@torch.no_grad()
def attribution(twin, passes) -> np.ndarray:
    """−⟨∂L/∂h, w·v⟩ of each source in each read, summed over tokens and micro-batches."""
    rows, columns = len(passes[0].states), len(sources_of(twin, passes[0].outputs))
    out = np.full((rows, columns), np.nan)
    for row in range(rows):
        total = 0
        for p in passes:
            values = torch.stack(sources_of(twin, p.outputs[: row + 1]))
            weight = p.weights[row].unsqueeze(-1) if p.weights else 1
            total = total - (p.mix_gradients[row] * weight * values).sum((1, 2, 3))
        out[row, : len(total)] = total
    return out


def entropy(weight):
    return -(weight * weight.log()).sum(0)


def gradient_norms(twin) -> dict[str, np.ndarray]:
    groups = [[] for _ in range(twin.config.layers)]
    others = []
    for name, parameter in twin.named_parameters():
        layer = layer_of(name)
        (others if layer is None or layer >= len(groups) else groups[layer]).append(parameter)
    total = norm(p.grad for p in twin.parameters())
    return {
        "clip_factor": min(1, CLIP / (total + 1e-6)),
        "param_grad_norm": np.array([norm(p.grad for p in group) for group in groups]),
        "param_norm": np.array([norm(group) for group in groups]),
        "other_grad_norm": norm(p.grad for p in others),
        "grad_norm": total,
    }


def layer_of(name: str) -> int | None:
    """Row of the layer that a parameter belongs to, from its name."""
    kind, number, part, *_ = [*name.split("."), "", ""]
    if kind == "blocks":
        return 2 * int(number) + part.startswith("mlp")
    return int(part) if (kind, number) == ("residual", "reads") else None


def norm(tensors) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors if t is not None))


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_has_its_twin(kind, tmp_path):
    model = decoder(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected, logged = [], []
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, every=1, matrices_every=MATRICES_EVERY
    ) as recorder:
        for step in range(4):
            expected.append(expected_of(model, batches(step)))
            optimizer.zero_grad()
            for tokens in batches(step):
                look_away(model)
                (loss_of(model(tokens), tokens) / 3).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            logged.append(0.5 * step)
            recorder.log(loss=logged[-1])
            look_away(model)
    run = probes.open_run(tmp_path / "run")
    assert not run.problems
    others = {"lr", "loss", "identity_error", "update_ratio"}
    assert set(run.metrics) == {*expected[0], *others, *SAMPLED_METRICS, *HOST}
    unknown = (
        set(METRICS) - set(run.metrics) - {"val_loss", "tokens", "skipped", "read_error", *EXPERT_METRICS}
    )
    assert unknown <= (DEPTH | {"query_norm"} if kind == "prenorm" else set())
    for name in expected[0]:
        steps = range(0, 4, MATRICES_EVERY if name in MATRICES else 1)
        assert run.steps(name).tolist() == list(steps)
        for found, step in zip(run[name], steps, strict=True):
            true = expected[step][name]
            # Of large parts of either sign, nearly nothing may be left.
            least = 1e-5 * np.nanmax(np.abs(true)) if name == "depth_attribution" else 1e-7
            np.testing.assert_allclose(found, true, rtol=1e-5, atol=least, err_msg=name)
    np.testing.assert_array_equal(run["loss"], np.float32(logged))
    np.testing.assert_allclose(run["lr"], 0.01)
    squares = run["other_grad_norm"] ** 2 + (run["param_grad_norm"] ** 2).sum(1)
    np.testing.assert_allclose(squares, run["grad_norm"] ** 2, rtol=1e-6)


def look_away(model):
    """Forwards that are not training: none of them may count."""
    (tokens,) = batches(99, [(4, 8)])
    with torch.no_grad():
        model(tokens)
    with torch.inference_mode():
        model(tokens)
    model.eval()
    loss_of(model(tokens), tokens)
    model.train()
    loss_of(model(tokens), tokens)  # its backward never runs


@pytest.mark.parametrize("kind", KINDS)
def test_identity_error_is_of_the_last_micro_batch(kind, tmp_path):
    model = decoder(kind)
    last = Pass(copy.deepcopy(model).double(), batches(0)[-1])
    sums = itertools.accumulate(last.outputs)
    pairs = zip(last.states, sums, strict=True)
    expected = [((state - sum_).norm() / state.norm()).item() for state, sum_ in pairs]
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        for tokens in batches(0):
            loss_of(model(tokens), tokens).backward()
        optimizer.step()
    found = probes.open_run(tmp_path / "run")["identity_error"]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_depth_weight_is_the_softmax_that_the_model_used(kind, tmp_path):
    model = decoder(kind)
    used = [[] for _ in model.residual.reads]
    for seen, read in zip(used, model.residual.reads, strict=True):
        read.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[1].detach()))
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(model, optimizer, 1)
    recorded = probes.open_run(tmp_path / "run")["depth_weight"][0]
    for row, seen in zip(recorded, used, strict=True):
        weight = torch.cat(seen, 1).flatten(1)
        assert np.abs(row[: len(weight)] - weight.mean(1).numpy()).max() < 1e-6
        assert np.isnan(row[len(weight) :]).all()


def test_tied_weights_count_once(tmp_path):
    model = decoder("full")
    model.head.weight = model.embedding.weight
    optimizer = sgd(model)
    expected = []
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        train(
            model, optimizer, 2, after=lambda loss: expected.append(norm(p.grad for p in model.parameters()))
        )
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run["grad_norm"], expected, rtol=1e-6)
    squares = run["other_grad_norm"] ** 2 + (run["param_grad_norm"] ** 2).sum(1)
    np.testing.assert_allclose(squares, run["grad_norm"] ** 2, rtol=1e-6)


def test_weights_shared_by_two_layers_belong_to_the_first(tmp_path):
    model = decoder("full")
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    second.output.weight = first.output.weight
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        expected = norm([*first.parameters(), *model.blocks[0].mlp_norm.parameters()])
        expected = math.hypot(expected, norm(model.residual.reads[1].parameters()))
        without = norm(p for n, p in second.named_parameters() if n != "output.weight")
        without = math.hypot(without, norm(model.blocks[1].mlp_norm.parameters()))
        without = math.hypot(without, norm(model.residual.reads[3].parameters()))
        train(model, optimizer, 1)
    param_norm = probes.open_run(tmp_path / "run")["param_norm"][0]
    np.testing.assert_allclose(param_norm[[1, 3]], [expected, without], rtol=1e-6)


def test_frozen_parameters_have_a_norm_and_no_gradient(tmp_path):
    model = decoder("full")
    model.embedding.weight.requires_grad_(False)
    for module in (model.blocks[1].attention, model.blocks[1].attention_norm, model.residual.reads[2]):
        module.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        train(model, optimizer, 1)
        expected = norm(p.grad for p in model.parameters())
    run = probes.open_run(tmp_path / "run")
    assert run["param_grad_norm"][0, 2] == 0 < run["param_norm"][0, 2]
    np.testing.assert_allclose(run["grad_norm"], [expected], rtol=1e-6)
    # The embedding's output requires no gradient, so there is none to know.
    assert np.isnan(run["output_grad_rms"][0, 0]) and np.isfinite(run["output_grad_rms"][0, 1:]).all()


def test_a_backward_pass_that_fails_does_not_end_the_measuring(tmp_path):
    model = decoder("full")
    optimizer = sgd(model)

    def fail(gradient):
        raise RuntimeError("out of memory, say")

    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        (tokens,) = batches(0, [(2, 8)])
        logits = model(tokens)
        handle = model.embedding.weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_of(logits, tokens).backward()
        handle.remove()
        model.zero_grad()
        train(model, optimizer, 2, after=lambda loss: None)
    assert probes.open_run(tmp_path / "run").steps("grad_norm").tolist() == [0, 1]


def test_a_diverged_step_is_recorded_as_what_it_is(tmp_path):
    """Not-a-number is a value: only what nobody observed is left out."""
    model = decoder("full")
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer) as recorder:
        with torch.no_grad():
            model.embedding.weight.fill_(math.nan)
        train(model, optimizer, 1)
        recorder.log(loss=torch.tensor(math.nan), val_loss=math.inf)
    run = probes.open_run(tmp_path / "run")
    assert np.isnan(run["hidden_rms"]).all() and np.isnan(run["loss"]).all()
    assert run["hidden_rms"].shape == (1, 7) and run["val_loss"][0] == math.inf
