"""Backward passes that are for something else, masks of one part of a model, models compiled in several graphs."""

import numpy as np
import pytest
import torch
from torch import nn

import probes
from tests.probes import zoo
from tests.probes.models import batches, decoder, loss_of, sgd, train
from tests.probes.test_zoo import noted


def made(name="sandwich norms"):
    torch.manual_seed(0)
    return zoo.ZOO[name]()


def ask_for_another_gradient(model, tokens, loss):
    torch.autograd.grad(100 * loss, model.words.weight, retain_graph=True)


def penalise_a_gradient(model, tokens, loss):
    (gradient,) = torch.autograd.grad(loss, model.words.weight, create_graph=True, retain_graph=True)
    gradient.square().sum()


def diagnose_another_batch(model, tokens, loss):
    other = loss_of(model(tokens.flip(0)[:1]), tokens[:1])
    torch.autograd.grad(other, model.words.weight)


@pytest.mark.parametrize("aside", [ask_for_another_gradient, penalise_a_gradient, diagnose_another_batch])
def test_a_pass_that_reaches_no_parameter_does_not_count(aside, tmp_path):
    model = made()
    expected = noted(model)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, strict=True):
        loss = loss_of(model(tokens), tokens)
        aside(model, tokens, loss)
        loss.backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-5, err_msg=metric)


def test_gradients_put_in_place_by_hand_are_said_to_be_missing(tmp_path, caplog):
    model = made()
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss_of(model(tokens), tokens), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert "no backward pass leave gradients on the parameters" in caplog.text
    assert "grad_norm" not in probes.open_run(tmp_path / "run").metrics


class Translator(nn.Module):
    """An encoder and a decoder, each with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Half(), Half()

    def forward(self, tokens, attention_mask=None, decoder_attention_mask=None):
        memory = self.encoder(tokens, attention_mask=attention_mask)
        return memory + self.decoder(tokens, attention_mask=decoder_attention_mask)


class Half(zoo.Model):
    def __init__(self):
        super().__init__(zoo.Sandwich)

    def forward(self, tokens, attention_mask=None):
        return super().forward(tokens)


@pytest.mark.parametrize("own", [False, True])
def test_a_decoder_is_masked_by_its_own_mask(own, tmp_path):
    torch.manual_seed(0)
    model = Translator()
    (tokens,) = batches(0, [(2, 8)])
    hidden = torch.ones(2, 8, dtype=torch.bool)
    hidden[:, 4:] = False
    embedded = model.decoder.words(tokens)
    expected = (embedded[hidden] if own else embedded).square().mean().sqrt().item()
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, stack="decoder.blocks"):
        other = hidden if own else None
        model(tokens, attention_mask=hidden, decoder_attention_mask=other).square().mean().backward()
        optimizer.step()
    found = probes.open_run(tmp_path / "run")["hidden_rms"][0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Broken(zoo.Model):
    """Leaves the compiler's graph between its blocks."""

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return self.head(self.last(zoo.state(x)))


def compiled_in_parts(way, block, path):
    """Two steps of a model whose blocks are compiled each, or with a graph that breaks between them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = (zoo.Model if way == "each block" else Broken)(block)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(2, 8)])
    with probes.record(model, path, optimizer=optimizer, every=1):
        if way == "each block":
            for each in model.blocks:
                each.compile(backend="aot_eager")
        else:
            model.compile(backend="aot_eager")
        for _ in range(2):
            loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    return probes.open_run(path)


@pytest.mark.parametrize("block", [zoo.Sandwich, zoo.Bare])
@pytest.mark.parametrize("way", ["each block", "graph breaks"])
def test_compiled_in_several_graphs(way, block, tmp_path):
    """Also where a block receives its state, and leaves the final one, at the edge of its graph."""
    torch.manual_seed(0)
    expected = noted(zoo.Model(block))
    run = compiled_in_parts(way, block, tmp_path / "run")
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-5, err_msg=metric)


class Untraceable(nn.Module):
    """A sublayer that no graph holds whole."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        torch._dynamo.graph_break()
        return self.inner(*given)


@pytest.mark.parametrize(("kind", "torn"), [("prenorm", ("hidden_grad_rms", "output_grad_rms")), ("full", ("output_grad_rms",))])  # fmt: skip
def test_a_gradient_that_no_graph_sees_whole_is_blank(kind, torn, tmp_path, caplog):
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = decoder(kind, blocks=2)
        for block in model.blocks:
            block.attention = Untraceable(block.attention)
        optimizer = sgd(model)
        with probes.record(model, tmp_path / f"{compiled}", optimizer=optimizer, every=1):
            if compiled:
                model.compile(backend="aot_eager")
            train(model, optimizer, 2)
        runs.append(probes.open_run(tmp_path / f"{compiled}"))
    eager, run = runs
    blank = {"hidden_grad_rms": [0, 2], "output_grad_rms": [0]}
    for name in ("hidden_grad_rms", "output_grad_rms", "hidden_rms", "param_grad_norm"):
        expected = eager[name].copy()
        if name in torn:
            expected[:, blank[name]] = np.nan
        np.testing.assert_allclose(run[name], expected, rtol=1e-5, err_msg=name)
    assert "depthscope leaves the gradients blank of " in caplog.text and "fullgraph=True" in caplog.text
