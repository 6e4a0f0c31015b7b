"""Models whose live attribution is tested, and runs of it."""

import pytest
import torch
from torch import nn

import attnres
import probes
from tests.attnres.models import tokens
from tests.probes.models import decoder, loss_of, sgd


def recorded(model, path, call, steps=1, **options):
    """A run with matrices at every step; `call(model)` gives the loss."""
    optimizer = sgd(model)
    with probes.record(
        model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True, **options
    ) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            call(model).backward()
            optimizer.step()
    return probes.open_run(path), recorder


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=17, num_key_value_heads=1, **sizes)
    model = transformers.LlamaForCausalLM(config).train()
    for parameter in model.parameters():  # as they start, layers add so little that the norms' eps is felt
        nn.init.normal_(parameter, std=0.5)
    return model


def converted(residual):
    model = llama()
    size = {"layers_per_block": 2} if residual == "block" else {}
    attnres.convert(model, residual=residual, example={"input_ids": tokens()}, **size)
    for parameter in model.attnres.parameters():
        nn.init.normal_(parameter)
    return model


class LayerNorms(nn.Module):
    """A decoder of ours with other norms."""

    def __init__(self):
        super().__init__()
        self.inner = decoder("prenorm", blocks=2)
        for block in self.inner.blocks:
            block.attention_norm, block.mlp_norm = (nn.LayerNorm(16, eps=0.1) for _ in range(2))
        self.inner.final_norm = nn.LayerNorm(16)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)

    def forward(self, x):
        return self.inner(x)


def logits_of(model, inputs):
    output = model(inputs)
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def loss_on(inputs):
    return lambda model: loss_of(logits_of(model, inputs), inputs)


MODELS = {
    "prenorm": lambda: decoder("prenorm", blocks=2),
    "layer norms": LayerNorms,
    "full": lambda: decoder("full", blocks=2),
    "block": lambda: decoder("block of 3", blocks=2),
    "llama": llama,
    "llama, full": lambda: converted("full"),
    "llama, block": lambda: converted("block"),
}
