"""A small decoder whose residual stream is a choice: PreNorm, Full or Block AttnRes, all else equal."""

import math

from torch import Tensor, nn

from attnres.config import DecoderConfig
from attnres.layers import Rotary, TransformerBlock
from attnres.residual import Block, Full, PreNorm

__all__ = ["Decoder", "DecoderConfig"]

INIT_STD = 0.02


class Decoder(nn.Module):
    """Embedding, transformer blocks around one residual stream, final norm, untied head.

    After the same `torch.manual_seed`, decoders that differ in `residual` only have the same shared weights:
    a residual draws no random numbers.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        rotary = Rotary(config.head_width, config.context, config.rope_base)
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config, rotary) for _ in range(config.blocks))
        self.residual = build_residual(config)
        self.final_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(initialise)
        for block in self.blocks:
            for output in (block.attention.output, block.mlp.output):
                # Each layer adds to the sum: keep its size at the start independent of the depth.
                nn.init.normal_(output.weight, std=INIT_STD / math.sqrt(config.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the tokens [B, T]; ValueError where T is above the context."""
        if tokens.shape[-1] > self.config.context:
            raise ValueError(
                f"The input has {tokens.shape[-1]} tokens, and the context is {self.config.context}."
            )
        stream = self.residual.open(self.embedding(tokens))
        for block in self.blocks:
            block(stream)
        return self.head(self.final_norm(stream.read()))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Two groups for an optimizer: matrices decay; vectors (queries and gains too) and embeddings do not.

        Decay would pull the queries to zero, that is every read to uniform weights.
        """
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        decays = {p: p.ndim >= 2 and id(p) not in embeddings for p in self.parameters()}
        return [
            {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
            {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
        ]


def build_residual(config: DecoderConfig) -> PreNorm | Full | Block:
    """The residual that the configuration names."""
    if config.residual == "full":
        return Full(config.width, config.layers, config.norm_eps)
    if config.residual == "block":
        return Block(config.width, config.layers, config.layers_per_block, config.norm_eps)
    return PreNorm()


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for Linear and Embedding weights; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
