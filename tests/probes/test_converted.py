"""Models that attnres converted: their reads are recorded, and nothing that is not what it says."""

import numpy as np
import pytest
import torch

import attnres
import probes

transformers = pytest.importorskip("transformers")


def test_reads_of_a_converted_model_are_recorded_and_stacked_outputs_are_blank(tmp_path, caplog):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(17, (2, 8))
    attnres.convert(model, residual="full", example={"input_ids": tokens})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    run = probes.open_run(tmp_path / "run")
    even = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(np.nan_to_num(run["depth_weight"][0]), even, atol=1e-6)
    assert np.isfinite(run["hidden_rms"]).all()
    # A converted layer returns a stack in which its output is a part.
    assert np.isfinite(run["output_rms"][0]).tolist() == [True, False, False, False, False]
    assert "saw nothing of" in caplog.text and "output_rms: layer 1" in caplog.text
