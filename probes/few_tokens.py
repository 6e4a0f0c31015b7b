"""Two forwards of a model on a few tokens of random numbers."""

import inspect
from collections.abc import Sequence
from itertools import product

import torch
from torch import nn

from probes.symbols import Untraceable
from probes.tape import Tape, record_tape

# Items and tokens of the two forwards; the last for a model of a short context.
_SIZES = (((3, 11), (2, 7)), ((3, 16), (2, 8)), ((3, 64), (2, 32)), ((3, 5), (2, 4)))
_MORE = 5  # times as many items, where a layer was dropped for all of them


def two_tapes(root: nn.Module) -> tuple[Tape, Tape]:
    """Tapes of the same model with two numbers of tokens. Untraceable, with the reason, where it cannot be run."""
    reason = "it is not known what its forward takes"
    embedded = any(isinstance(m, nn.Embedding) for m in root.modules())
    for pair, numbers in product(_SIZES, (True,) if embedded else (False, True)):
        try:
            tapes = _tapes(root, pair, numbers)
            if any(map(_dropped, tapes)):
                tapes = _tapes(root, [(_MORE * items - 1, tokens) for items, tokens in pair], numbers)
            return tapes
        except Exception as error:
            reason = f"a forward on a few tokens fails ({type(error).__name__}: {error})".splitlines()[0]
    raise Untraceable(reason)


def _tapes(root: nn.Module, sizes: Sequence[tuple[int, int]], numbers: bool) -> tuple[Tape, Tape]:
    return tuple(record_tape(root, *_tokens(root, *size, numbers), *size) for size in sizes)


def _dropped(tape: Tape) -> bool:
    """Whether random numbers have made something nothing, as stochastic depth does: what is made of that cannot be told."""
    drawn = sum(1 << node.index for node in tape.nodes if node.draws)
    return any(
        tape.behind[node.index] & drawn and not node.value.any()
        for node in tape.nodes
        if node.tensor.is_floating_point() and node.tensor.numel() >= tape.items * tape.tokens
    )


def _tokens(root: nn.Module, items: int, tokens: int, numbers: bool) -> tuple[tuple, dict]:
    """What a language model may be called with, for every argument that must be given: `numbers` of tokens, else
    vectors."""
    parameter = next(root.parameters())
    parameters = inspect.signature(root.forward).parameters.values()
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    generator = torch.Generator().manual_seed(0)
    matrices = [p for p in root.parameters() if p.ndim == 2] or [parameter]
    if numbers:
        sizes = [m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding)]
        most = max(min(sizes or [len(p) for p in matrices]), 2)
        given = torch.randint(most, (items, tokens), generator=generator)
    else:
        given = torch.randn(items, tokens, matrices[0].shape[-1], generator=generator).to(parameter.dtype)
    return (given.to(parameter.device),) * max(1, len(needed)), {}
