"""What is attributed: a number for each token or each sequence, from what a model returns."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.manifest import RunError

_IGNORED = -100


# Of a model's output, the arguments it was called with, and the mask [B, T] in them that says which tokens count.
Objective = Callable[[object, tuple, Mapping, Tensor | None], Tensor]


def next_token_losses(output: object, args: tuple, kwargs: Mapping, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token, [B, T-1], from logits [B, T, V]; NaN where it, or the one it is told from, is
    padding (`mask`), and where `labels` leave it out, and infinite where the model makes no number of it.

    RunError where there are no such logits.
    """
    logits, tokens = logits_of(output), tokens_of(args, kwargs)
    fits = logits is not None and logits.ndim == 3 and tokens is not None
    if not fits or logits.shape[:2] != tokens.shape:
        raise RunError(
            "The model does not give logits [B, T, V] of tokens [B, T]: pass loss=, a function of its output that gives "
            "one number for each sequence, or for each of its tokens."
        )
    if tokens.shape[1] < 2:
        raise RunError(
            "Of a sequence of one token there is no next one to predict: take longer sequences, or pass loss=, a function of "
            "the model's output."
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    next_ones = tokens[:, 1:].long()
    if mask is not None and mask.shape == tokens.shape:
        known = mask.bool()
        next_ones = next_ones.masked_fill(~(known[:, 1:] & known[:, :-1]), _IGNORED)
    labels = kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == tokens.shape:
        next_ones = next_ones.masked_fill(labels[:, 1:] == _IGNORED, _IGNORED)
    each = F.cross_entropy(
        wide[:, :-1].flatten(0, 1), next_ones.flatten(), reduction="none", ignore_index=_IGNORED
    ).view(next_ones.shape)
    return each.masked_fill(each.isnan(), torch.inf).masked_fill(next_ones == _IGNORED, torch.nan)


def logit(token: int, position: int = -1, minus: int | None = None) -> Callable[[object], Tensor]:
    """The logit of a token at a position of each sequence, [B]; with `minus`, what it is above another's.

    The function says what it gives, as its attributes `target` and `unit`.
    """

    def of(output: object) -> Tensor:
        logits = logits_of(output)
        if logits is None or logits.ndim != 3:
            raise RunError("The model does not give logits [B, T, V], so there is no logit of a token.")
        _, count, vocabulary = logits.shape
        for each in (token, *(() if minus is None else (minus,))):
            if not 0 <= each < vocabulary:
                raise RunError(
                    f"There is no logit of token {each}: the model knows tokens 0 to {vocabulary - 1}."
                )
        if not -count <= position < count:
            raise RunError(f"There is no position {position} in sequences of {count} tokens.")
        here = logits[:, position].to(torch.promote_types(logits.dtype, torch.float32))
        return here[:, token] - (0 if minus is None else here[:, minus])

    than = "" if minus is None else f" minus that of token {minus}"
    of.target, of.unit = f"logit of token {token}{than} at position {position}", "logits"
    return of


def logits_of(output: object) -> Tensor | None:
    """The logits a model returned: alone, as `logits` of an object or a mapping, or as the first of several."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def tokens_of(args: tuple, kwargs: Mapping) -> Tensor | None:
    """The token ids that a model is called with; None where there are none."""
    found = kwargs.get("input_ids", args[0] if args else next(iter(kwargs.values()), None))
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def token_means(values: Tensor) -> Tensor:
    """[B, T] to the mean of each sequence [B], without what is NaN; NaN where all of it is."""
    known = ~values.isnan()
    return values.masked_fill(~known, 0).sum(1) / known.sum(1)
