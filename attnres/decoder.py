"""A small decoder whose residual stream is a choice: AttnRes, PreNorm or another baseline, all else equal."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from attnres.baselines import DeepNorm, PostNorm, Rescaled, name_in
from attnres.cache import Cache
from attnres.checks import check_is, check_tokens, check_vocabulary
from attnres.config import DecoderConfig
from attnres.layers import Rotary, TransformerBlock
from attnres.residual import Block, Full, PreNorm
from attnres.stream import Residual

__all__ = ["Decoder", "DecoderConfig"]

INIT_STD = 0.02


class Decoder(nn.Module):
    """Embedding, transformer blocks around one residual stream, final norm, untied head.

    After the same `torch.manual_seed`, decoders that differ in `residual` only have the same shared weights:
    a residual draws no random numbers. DeepNorm alone brings initial weights of its own for its layers, not for
    embedding and head.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        check_is("config", config, DecoderConfig)
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
        if isinstance(self.residual, DeepNorm):
            for block in self.blocks:
                attention, mlp = block.attention, block.mlp
                self.residual.initialise(
                    plain=[attention.query, attention.key],
                    shrunk=[attention.value, attention.output, mlp.gate, mlp.up, mlp.output],
                )

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] of the tokens [B, T]; ValueError where they are not that, or T is above the context.

        With a cache the tokens continue those in it, and join them.
        """
        check_tokens(tokens)
        if tokens.shape[-1] > self.config.context:
            raise ValueError(
                f"The input has {tokens.shape[-1]} tokens, and the context is {self.config.context}."
            )
        try:
            embedding = self.embedding(tokens)
        except IndexError:
            check_vocabulary(tokens, self.config.vocabulary)
            raise
        known = {} if cache is None or cache.queries is None else {"queries": cache.queries}
        stream = self.residual.open(embedding, **known)
        memories = [None] * len(self.blocks) if cache is None else cache.advance(tokens.shape[-1])
        for block, memory in zip(self.blocks, memories, strict=True):
            block(stream, memory)
        return self.head(stream.read_through(self.final_norm))

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As every module's; ValueError naming the field where a strict one is of another decoder."""
        if strict:
            check_same_decoder(self.config, state_dict)
        return super().load_state_dict(state_dict, strict, assign)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: matrices decay; vectors (queries and gains too) and embeddings do not.

    Decay would pull the queries to zero, that is every read to uniform weights.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decays = {p: p.ndim >= 2 and id(p) not in embeddings for p in model.parameters()}
    return [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


def build_residual(config: DecoderConfig) -> Residual:
    """The residual that the configuration names."""
    width, layers = config.width, config.layers
    return {
        "prenorm": lambda: PreNorm(),
        "full": lambda: Full(width, layers, config.norm_eps),
        "block": lambda: Block(width, layers, config.layers_per_block, config.norm_eps),
        "postnorm": lambda: PostNorm(),
        "deepnorm": lambda: DeepNorm(config.blocks),
        "rescaled": lambda: Rescaled(),
    }[config.residual]()


def check_same_decoder(config: DecoderConfig, state_dict: Mapping[str, Tensor]) -> None:
    """ValueError naming the field of the configuration that shows in a state dict's names and shapes and differs."""
    if "embedding.weight" not in state_dict:
        return
    vocabulary, width = state_dict["embedding.weight"].shape
    kept = state_dict.get("residual._extra_state")
    if any(name.startswith("residual.reads.") for name in state_dict):
        kinds = ("full", "block")
    else:
        kinds = ("prenorm" if kept is None else name_in(kept),)
    found = {
        "vocabulary": vocabulary,
        "width": width,
        "blocks": len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
        "residual": config.residual if config.residual in kinds else " or ".join(kinds),
    }
    for field, theirs in found.items():
        if theirs != getattr(config, field):
            raise ValueError(
                f"{field} is {getattr(config, field)}, and the state dict was saved from a decoder with {theirs}: build the "
                "model as that one was built."
            )


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for Linear and Embedding weights; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
