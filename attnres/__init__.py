"""Attention Residuals: the definition, the residual streams, a decoder, real text and a training loop."""

# Another package on PyPI, fast-attnres, also installs an `attnres`: this tells ours apart.
__depthscope__ = True

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('attnres needs torch: pip install "depthscope[probes]"') from error

from attnres.attnres_block import AttnResBlock
from attnres.baselines import DeepNorm, PostNorm, Rescaled
from attnres.converting import convert, revert
from attnres.corpus import Corpus
from attnres.decoder import Decoder, DecoderConfig
from attnres.depth_attention import DepthAttention
from attnres.functional import block_attn_res, full_attn_res
from attnres.generation import generate
from attnres.residual import Block, Full, PreNorm
from attnres.training import Training, TrainingConfig
from attnres.watching import ConversionError

__all__ = [
    "AttnResBlock",
    "Block",
    "ConversionError",
    "Corpus",
    "Decoder",
    "DecoderConfig",
    "DeepNorm",
    "DepthAttention",
    "Full",
    "PostNorm",
    "PreNorm",
    "Rescaled",
    "Training",
    "TrainingConfig",
    "block_attn_res",
    "convert",
    "full_attn_res",
    "generate",
    "revert",
]
