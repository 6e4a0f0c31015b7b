"""Small decoders, and what the definition makes of the same weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attnres import Decoder, DecoderConfig, definition

RESIDUALS = {
    "prenorm": {"residual": "prenorm"},
    "full": {"residual": "full"},
    "block of 1": {"residual": "block", "layers_per_block": 1},
    "block of 2": {"residual": "block", "layers_per_block": 2},
    "block of 4, ragged": {"residual": "block", "layers_per_block": 4},
    "one block of all": {"residual": "block", "layers_per_block": 6},
    "block larger than the model": {"residual": "block", "layers_per_block": 99},
    "postnorm": {"residual": "postnorm"},
    "deepnorm": {"residual": "deepnorm"},
    "rescaled": {"residual": "rescaled"},
}
ATTNRES = [kind for kind, fields in RESIDUALS.items() if fields["residual"] in ("full", "block")]


def small_config(**changes) -> DecoderConfig:
    """Six layers, 16 wide."""
    return DecoderConfig(**{"vocabulary": 17, "width": 16, "blocks": 3, "context": 8} | changes)


def seeded_decoder(seed: int = 0, **changes) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(small_config(**changes))


def lively_decoder(**changes) -> Decoder:
    """float64, every parameter random and large enough to matter: queries, gains and norms too."""
    model = seeded_decoder(**changes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            vector = parameter.ndim == 1 and not name.endswith("query")
            parameter.copy_(1 + 0.3 * noise if vector else 0.4 * noise)
    return model


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 17) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


def loss_of(logits: Tensor, inputs: Tensor) -> Tensor:
    """Any loss will do, so long as every logit matters: predict the input itself."""
    return F.cross_entropy(logits.flatten(0, 1), inputs.flatten())


def layers_of(model: Decoder) -> list[definition.Layer]:
    """f_1..f_L of the definition, pre-norms included, from the model's own modules."""
    layers = []
    for block in model.blocks:
        layers.append(lambda h, b=block: b.attention(b.attention_norm(h)))
        layers.append(lambda h, b=block: b.mlp(b.mlp_norm(h)))
    return layers


def defined_pass(model: Decoder, embedding: Tensor) -> definition.DepthPass:
    """The definition's forward pass over depth, on the model's weights."""
    config, layers = model.config, layers_of(model)
    if config.residual == "prenorm":
        return definition.prenorm(embedding, layers)
    if config.residual == "rescaled":
        return definition.rescaled(embedding, layers)
    if config.residual in ("postnorm", "deepnorm"):
        sublayers = [layer for block in model.blocks for layer in (block.attention, block.mlp)]
        norms = [norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)]
        scale = (2 * config.blocks) ** 0.25 if config.residual == "deepnorm" else 1.0
        return definition.post_norm(embedding, sublayers, norms, scale)
    queries = [read.gain * read.query for read in model.residual.reads]
    if config.residual == "full":
        return definition.full(embedding, layers, queries, config.norm_eps)
    return definition.block(embedding, layers, queries, config.layers_per_block, config.norm_eps)
