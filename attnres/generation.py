"""Continue a text, token by token, greedily or by sampling."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from attnres.cache import Cache
from attnres.checks import check_count, check_is, check_not_negative, check_tokens, check_vocabulary
from attnres.decoder import Decoder
from attnres.residual import AttnRes


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Tensor:
    """The tokens [B, T], all rows of one length, with `new_tokens` more: [B, T + new_tokens].

    Temperature 0 takes the likeliest token each time; above it, tokens are drawn, of the `top_k` likeliest only where
    that is given. With `compiled` the step of one token is compiled. ValueError naming the argument that cannot be.
    """
    check_count("new_tokens", new_tokens)
    check_count("top_k", top_k, optional=True)
    check_not_negative("temperature", temperature)
    check_is("model", model, Decoder)
    check_tokens(tokens)
    check_vocabulary(tokens, model.config.vocabulary)
    if generator is not None:
        check_is("generator", generator, torch.Generator)
    batch, prompt = tokens.shape
    capacity = prompt + new_tokens
    if not 1 <= prompt <= model.config.context - new_tokens:
        raise ValueError(
            f"new_tokens: {prompt} tokens and {new_tokens} more do not fit in the context of {model.config.context}."
        )
    was_training = model.training
    model.eval()
    try:
        queries = model.residual.queries() if isinstance(model.residual, AttnRes) else None
        cache = Cache(model.config, batch, capacity, model.embedding.weight, queries)
        step = _compiled_step() if compiled else _step
        logits = _step(model, tokens, cache)
        continued = [tokens]
        for index in range(new_tokens):
            if index:
                logits = step(model, continued[-1], cache)
            continued.append(choose(logits, temperature, top_k, generator))
        return torch.cat(continued, dim=-1)
    finally:
        model.train(was_training)


def choose(
    logits: Tensor, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row, [B, 1], from its logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        likeliest, tokens = logits.topk(top_k)
        return tokens.gather(-1, torch.multinomial(likeliest.softmax(-1), 1, generator=generator))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _step(model: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
    """The logits [B, V] of the token after these, [B, T]."""
    return model(tokens, cache)[:, -1]


@functools.cache
def _compiled_step() -> Callable[[Decoder, Tensor, Cache], Tensor]:
    return torch.compile(_step, fullgraph=True)
