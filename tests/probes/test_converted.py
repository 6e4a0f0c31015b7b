"""Models that attnres converted: their reads are recorded, and nothing that is not what it says."""

import numpy as np
import pytest
import torch

import attnres
import probes

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("residual", ["full", "block"])
def test_reads_and_outputs_of_a_converted_model(residual, tmp_path, caplog):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(17, (2, 8))
    size = {"layers_per_block": 3} if residual == "block" else {}
    attnres.convert(model, residual=residual, example={"input_ids": tokens}, **size)
    seen = []
    handle = model.attnres.reads[-1].register_forward_pre_hook(lambda m, args: seen.extend(args[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, every=1):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    handle.remove()
    assert not [record for record in caplog.records if record.name == "depthscope"]
    run = probes.open_run(tmp_path / "run")
    rows, columns = len(run.reads), len(run.sources)
    counts = np.array([read.sources for read in run.reads])
    even = np.where(np.arange(columns) < counts[:, None], 1 / counts[:, None], 0)
    np.testing.assert_allclose(np.nan_to_num(run["depth_weight"][0]), even, atol=1e-6)
    assert np.isfinite(run["hidden_rms"]).all() and rows == 7
    for name in ("output_rms", "output_grad_rms"):
        assert np.isfinite(run[name]).all() and (run[name] > 0).all()
    if residual == "full":  # the final read's sources are the outputs themselves
        rms = [source.detach().square().mean().sqrt().item() for source in seen]
        np.testing.assert_allclose(run["output_rms"][0], rms, rtol=1e-5)
