"""Each recipe of docs/attach.md, run as it stands, leaves a run that can be read."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probes
from attnres import Decoder, DecoderConfig
from probes import marks
from tests.probes.models import loss_of
from tests.probes.test_zoo import Two

PAGE = Path(__file__).parents[1] / "docs" / "attach.md"
RECIPES = re.findall(
    r"^#{1,3} (?P<title>[^\n]+)\n(?:(?!^#{1,3} ).)*?^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M
)


def namespace() -> dict:
    """What a training script has before it meets the probes."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(width=16, blocks=2, heads=2, context=16))
    batches = [torch.randint(1, 256, (2, 8)) for _ in range(2)]
    return {
        "torch": torch,
        "nn": nn,
        "probes": probes,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": batches,
        "batch": batches[0],
        "loss_of": loss_of,
        "two_stacks": Two(),
    }


def test_every_block_is_a_recipe():
    assert len(RECIPES) == PAGE.read_text().count("```python\n") > 15


@pytest.mark.parametrize(("title", "code"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, code, tmp_path, monkeypatch, caplog):
    libraries = re.findall(r"^(?:from|import) (transformers|accelerate|lightning)", code, re.M)
    if "TrainingArguments" in code:
        libraries.append("accelerate")  # which that Trainer needs
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names = namespace()
    try:
        exec(compile(code, f"docs/attach.md, {title}", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if not re.search(r"probes\.(record|attach)\(", code):
        return
    if (recorder := names.get("recorder")) is not None:
        recorder.close()
    assert not marks._listening
    run = probes.open_run("runs/my-run")
    assert run.status == "finished"
    assert not [
        record
        for record in caplog.records
        if record.name == "depthscope" and "no optimizer" in record.message
    ]
    if ".backward()" in code or "probes.attach(" in code:
        assert np.isfinite(run["hidden_rms"][0]).all() and np.isfinite(run["output_rms"][0]).all()
        assert np.isfinite(run["output_grad_rms"][0]).all() and run["grad_norm"][0] > 0
