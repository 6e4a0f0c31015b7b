"""An input to try a model on, where nobody gave one."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

_ITEMS, _TOKENS = 2, 8
_IMAGE_SIZES = (224, 32)


def inputs(root: nn.Module) -> Iterator[tuple[tuple, Mapping]]:
    """Arguments that `root` may accept, the likeliest first: its own dummies, tokens, images, states."""
    dummies = getattr(root, "dummy_inputs", None)
    if isinstance(dummies, Mapping):
        yield (), dummies
    modules = list(root.modules())
    parameter = next(root.parameters())
    embedding = next((m for m in modules if isinstance(m, nn.Embedding)), None)
    if embedding is not None:
        yield (torch.randint(embedding.num_embeddings, (_ITEMS, _TOKENS), device=parameter.device),), {}
    image = next((m for m in modules if isinstance(m, nn.Conv2d)), None)
    if image is not None:
        sizes = [
            getattr(m, "image_size", getattr(m, "img_size", None))
            for m in [*modules, getattr(root, "config", None)]
        ]
        for size in [*filter(None, sizes), *_IMAGE_SIZES]:
            height, width = size if isinstance(size, tuple | list) else (size, size)
            shape = _ITEMS, image.in_channels, height, width
            yield (torch.randn(shape, dtype=parameter.dtype, device=parameter.device),), {}
    matrix = next((p for p in root.parameters() if p.ndim == 2), None)
    if matrix is not None:
        shape = _ITEMS, _TOKENS, matrix.shape[1]
        yield (torch.randn(shape, dtype=parameter.dtype, device=parameter.device),), {}
