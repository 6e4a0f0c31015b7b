"""Models of transformers, as they are: layers found and numbers as of the residual stream written by hand."""

import numpy as np
import pytest
import torch

import probes
from tests.attnres.families import FAMILIES, logits_of
from tests.probes.test_zoo import rms

pytest.importorskip("transformers")


def by_hand(family, model, inputs) -> dict[str, list[float]]:
    """The plain residual stream of the model's own layers, with autograd."""
    embedding, layers, head = family.parts(model, inputs)
    states, outputs = [embedding], [embedding]
    for layer in layers:
        outputs.append(layer(states[-1]))
        states.append(states[-1] + outputs[-1])
    for x in {*states, *outputs}:
        x.retain_grad()
    loss_of(head(states[-1])).backward()
    model.zero_grad()
    return {
        "hidden_rms": [rms(x) for x in states],
        "output_rms": [rms(x) for x in outputs],
        "hidden_grad_rms": [rms(x.grad) for x in states],
        "output_grad_rms": [rms(x.grad) for x in outputs],
        "block_rms": [rms(x) for x in states[2::2]],
    }


def loss_of(logits):
    return logits.float().square().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_the_stream_by_hand(name, tmp_path, caplog):
    family = FAMILIES[name]
    model, inputs = family.seeded(), family.inputs()
    model.train()
    expected = by_hand(family, model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probes.record(model, tmp_path / "run", optimizer=optimizer):
        loss_of(logits_of(model(**inputs))).backward()
        optimizer.step()
    assert not [record for record in caplog.records if record.name == "depthscope"]
    run = probes.open_run(tmp_path / "run")
    for metric, values in expected.items():
        np.testing.assert_allclose(run[metric][0], values, rtol=1e-4, err_msg=metric)
    assert (run["identity_error"][0] < 1e-5).all()
    assert [layer.kind for layer in run.layers] == ["attention", "mlp"] * (len(run.layers) // 2)


def test_described_without_a_batch():
    described = probes.describe(FAMILIES["Llama"].seeded())
    assert described.holds and described.invented
    assert "model.layers.0.self_attn" in str(described)
