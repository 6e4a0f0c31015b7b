"""Every block of Python in docs/attnres.md runs, section by section, each on what the blocks before it left."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import attnres
from tests.attnres.families import DiT, dit_inputs, llama, token_inputs

pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[2] / "docs" / "attnres.md").read_text()
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    for title, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
}


class Causal(nn.Module):
    """Somebody's attention."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)


def namespace(folder) -> dict:
    """What a reader has before the page begins."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    width, inputs = 16, dit_inputs()
    sources = [torch.randn(2, 5, width) for _ in range(3)]
    return {
        "torch": torch, "nn": nn, "attnres": attnres, "AutoModelForCausalLM": AutoModelForCausalLM,
        "width": width, "sources": sources, "blocks": sources[:2], "partial_block": sources[2],
        "Attention": Causal, "MLP": lambda width: nn.Linear(width, width), "model": llama(), "folder": folder,
        "diffusion_model": DiT(), "patches": inputs["x"], "times": inputs["t"], "device": "cpu",
        "tokens": token_inputs()["input_ids"],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    def run(title: str, leave_out: str | None = None) -> dict:
        names = namespace(tmp_path)
        for code in SECTIONS[title]:
            if leave_out is None or leave_out not in code:
                exec(compile(code, f"docs/attnres.md, {title}", "exec"), names)
        return names

    return run


def test_no_block_is_outside_a_section():
    assert sum(map(len, SECTIONS.values())) == PAGE.count("```python\n") >= 13


def test_in_a_model_of_your_own(run):
    names = run("In a model of your own")
    assert names["weights"].shape == (3, 2, 5)
    torch.manual_seed(0)
    model = names["Model"](32, 16, 3, 4)
    logits = model(names["tokens"])
    logits.square().mean().backward()
    assert logits.shape == (2, 7, 32)
    # The first read of all has one source, so its weight is one whatever the query.
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("read.gain" in name or name.startswith("blocks.0.attention_read") for name in silent)


def test_in_a_model_that_exists(run):
    names = run("In a model that exists")
    assert not hasattr(names["model"], "attnres")
    assert len(names["optimizer"].param_groups[1]["params"]) == 2 * 7
    assert len(names["again"].attnres.reads) == 7
    assert names["diffusion_model"](names["patches"], names["times"]).isfinite().all()


def test_the_decoder(run):
    names = run("The decoder", leave_out="compiled=True")
    assert names["logits"].shape == (2, 7, 256)
    assert names["text"].shape == (2, 15)
    assert names["decoder"].residual.schedule == "two_phase"


@pytest.mark.long
def test_the_decoder_compiled(run):
    assert run("The decoder")["text"].shape == (2, 15)


def test_a_fused_kernel(run):
    run("A fused kernel on a GPU")
