"""The configuration of a decoder."""

from dataclasses import dataclass

from attnres.checks import check_above, check_count

RESIDUALS = ("prenorm", "full", "block", "postnorm", "deepnorm", "rescaled")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. A field that cannot be raises ValueError, in one sentence that names it."""

    vocabulary: int = 256
    """Number of tokens; 256 for bytes."""
    width: int = 128
    """D, the width of the residual stream."""
    blocks: int = 12
    """Transformer blocks; each is two layers, attention and MLP."""
    heads: int = 4
    kv_heads: int = 2
    """Key and value heads, shared by groups of query heads."""
    mlp_width: int | None = None
    """Hidden width of the SwiGLU; by default 8/3 of the width, rounded up to a multiple of 32."""
    context: int = 256
    """The longest input, in tokens."""
    residual: str = "prenorm"
    """prenorm, full or block; or another baseline: postnorm, deepnorm, rescaled."""
    layers_per_block: int | None = None
    """Layers (sublayers, so two per transformer block) in a depth block; for residual "block" only."""
    norm_eps: float = 1e-8
    """Eps of every RMSNorm, the key norm of depth attention too.

    At step 0 AttnRes divides the state by the number of sources, and eps then counts: with the other defaults
    the gradients of Full differ from PreNorm's by 41 % at 1e-6, 0.6 % at 1e-8, and below 1e-6 at 1e-12.
    """
    rope_base: float = 10000.0

    def __post_init__(self):
        for name in ("vocabulary", "width", "blocks", "heads", "kv_heads", "mlp_width", "context"):
            check_count(name, getattr(self, name), optional=name == "mlp_width")
        for name in ("norm_eps", "rope_base"):
            check_above(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice heads ({2 * self.heads}), not {self.width}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), and {self.kv_heads} does not.")
        self._check_residual()

    def _check_residual(self) -> None:
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, not {self.residual!r}.")
        if self.residual == "block" and self.layers_per_block is None:
            raise ValueError('layers_per_block must be given for residual "block".')
        if self.residual != "block" and self.layers_per_block is not None:
            raise ValueError(f'layers_per_block is for residual "block" only, not for {self.residual!r}.')
        check_count("layers_per_block", self.layers_per_block, optional=True)

    @property
    def layers(self) -> int:
        """L: attention and MLP sublayers together."""
        return 2 * self.blocks

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """The SwiGLU's hidden width, with the default worked out."""
        return self.mlp_width or -(-8 * self.width // 96) * 32
