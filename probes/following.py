"""Follow two sequences through training: their depth weights, token by token, at the steps of a schedule.

The sequences are the first of the first training batch. At a snapshot they go through the model once more, in
evaluation and without gradients, and nothing is left behind.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from probes.backwards import in_backward
from probes.clock import Moment
from probes.faults import Faults
from probes.flush import start_copy
from probes.hooks import Hook
from probes.masks import Masks
from probes.read_taps import ReadTaps
from probes.schedule import Schedule
from probes.sites import Sites
from probes.tokens import MOST_SEQUENCES, MOST_TOKENS, write_tokens
from probes.unchanged import generators
from probes.vocabulary import TOKEN_WEIGHT
from probes.writer import RunWriter

Decode = Callable[[Sequence[int]], str]
Arguments = tuple[tuple, dict]

# Arguments of compiled models, by place, for whoever waits for them, by number; and the type they are cast to.
_waiting: dict[int, dict[str, Tensor]] = {}
_casts: dict[int, str] = {}


@torch.library.custom_op("depthscope::show", mutates_args={"seen"})
def _show(x: Tensor, seen: Tensor, who: int, place: str, cast: str) -> None:
    """Hand an argument of a compiled model over: nothing else inside a graph sees its values. (`seen` is never written
    to, but an operation that changes nothing would be left out.)"""
    if who in _waiting and place not in _waiting[who]:
        _waiting[who][place] = x.clone()
        _casts[who] = cast


@_show.register_fake
def _(x, seen, who, place, cast):
    return None


class Following:
    """Takes a snapshot at each step of `steps`: an eager model's before its first forward of the step, a compiled one's
    before the update. Of reads that were found (foreign.py) what does not give back the state is blank."""

    def __init__(
        self,
        sites: Sites,
        steps: Schedule,
        decode: Decode | None,
        masks: Masks,
        faults: Faults,
        writer: RunWriter,
        now: Callable[[], Moment],
    ):
        self._sites, self._steps, self._decode, self._masks = sites, steps, decode, masks
        self._faults, self._writer, self._now = faults, writer, now
        self.silent = False  # another process tells
        self._arguments: Arguments | None = None
        self._read = False  # what the followed tokens are
        self._ids: np.ndarray | None = None
        self._texts: list[list[str]] | None = None
        self._due = False
        self._caught: dict[int, Tensor] | None = None  # [S, B, T] by read, while a snapshot is taken
        self._window: Tensor | None = None  # [sequence or 1, token]: which tokens are followed
        self._found = ReadTaps(sites.found, self._computed) if sites.found is not None else None
        self._seen = torch.zeros(1, device=next(sites.root.parameters()).device)
        self._who = id(self)
        _waiting[self._who] = {}
        self._handles = [
            # Before the taps: a snapshot is a forward of its own.
            sites.called.register_forward_pre_hook(Hook(self._called), with_kwargs=True, prepend=True),
            *(
                read.register_forward_hook(
                    Hook(lambda read, args, output, row=row: self._catch(row, output[1]))
                )
                for row, read in enumerate(sites.reads)
            ),
        ]
        for module, before, met in self._found.places() if self._found is not None else ():
            self._handles.append(self._met_before(module, met) if before else self._met_after(module, met))

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        self._due = self._steps(step)
        self._device = next(self._sites.root.parameters()).device.type  # the model may have moved

    def take(self) -> None:
        """Take the snapshot of this step, where it is due and not taken yet."""
        if not self._due:
            return
        with self._faults.guard(TOKEN_WEIGHT.name):
            if self._arguments is None and _waiting.get(self._who):
                self._arguments = _first_sequences(*_rebuilt(_waiting.pop(self._who)))
            if self._arguments is not None:
                self._due = False
                self._hand_over(self._weights())

    def detach(self) -> None:
        _waiting.pop(self._who, None)
        _casts.pop(self._who, None)
        while self._handles:
            self._handles.pop().remove()

    # Hooks

    def _called(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            cast = _autocast_type(self._device)
            for place, value in _leaves([args, kwargs]):
                if isinstance(value, Tensor):
                    _show(value.detach(), self._seen, self._who, place, cast)
        elif not in_backward():
            with self._faults.guard(TOKEN_WEIGHT.name):
                if self._arguments is None:
                    _waiting.pop(self._who, None)
                    self._arguments = _first_sequences(args, kwargs)
            self.take()

    def _catch(self, row: int, weight: Tensor) -> None:
        if not torch.compiler.is_compiling() and self._caught is not None:
            self._caught[row] = weight.detach()

    def _met_before(self, module: nn.Module, met: Callable[[object], None]):
        hook = Hook(lambda module, args, kwargs: self._meet(met, (args, kwargs)))
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _met_after(self, module: nn.Module, met: Callable[[object], None]):
        return module.register_forward_hook(Hook(lambda module, args, output: self._meet(met, output)))

    def _meet(self, met: Callable[[object], None], values: object) -> None:
        if not torch.compiler.is_compiling() and self._caught is not None:
            met(values)

    def _computed(
        self,
        row: int,
        weight: Tensor,
        sources: list[Tensor],
        state: Tensor | None,
        mix: Tensor | None,
        error: Tensor,
        allowed: float,
    ) -> None:
        self._caught[row] = weight.where(error <= allowed, torch.nan)

    # A snapshot

    def _weights(self) -> Tensor:
        """[sequence, token, cells], NaN for padding and for a read that was not seen."""
        args, kwargs = self._arguments
        model = self._sites.called
        self._caught = {}
        try:
            with _without_a_trace(model), _cast(self._device, _casts.get(self._who, "")):
                model(*args, **kwargs)
            caught = self._caught
        finally:
            self._caught = None
            if self._found is not None:
                self._found.forget()
        if not caught:
            raise RuntimeError("no read was called when the first sequences went through the model once more")
        sequences = min(len(_tokens(args, kwargs)), MOST_SEQUENCES)
        caught = {row: self._by_sequence(weight, sequences) for row, weight in caught.items()}
        like = next(iter(caught.values()))
        blank = torch.full_like(like[:1], torch.nan)
        rows = [
            caught.get(row, blank.expand(sources, *blank.shape[1:]))
            for row, sources in enumerate(self._sites.depth_sources)
        ]
        mask = self._masks.of_model(args, kwargs)
        if mask is not None and mask.shape != like.shape[1:]:  # the model may add tokens of its own
            mask = None
        self._window = _window(mask, like.shape[-1], like.device)
        places = self._window.expand(sequences, -1)
        rows = [row.take_along_dim(places.unsqueeze(0), 2) for row in rows]
        weight = torch.cat([row.float() for row in rows]).permute(1, 2, 0)
        if mask is None:
            return weight
        return weight.where(mask.take_along_dim(places, 1).unsqueeze(-1) != 0, torch.nan)

    def _by_sequence(self, weight: Tensor, sequences: int) -> Tensor:
        """[S, B, T] of weights that may have all tokens on one axis, or tokens first."""
        if self._sites.found is not None and self._sites.found.tokens_first:
            return weight.flatten(1).unflatten(1, (-1, sequences)).transpose(1, 2)
        return weight.flatten(1).unflatten(1, (sequences, -1))

    def _hand_over(self, weight: Tensor) -> None:
        if self.silent:
            return
        now, values = self._now(), {"weight": weight}
        if now.skips is not None:
            values["skips"] = now.skips
        if not self._read:  # the one time that a number is read back
            self._read, self._ids = True, _ids(*self._arguments, self._window)
            if self._ids is not None and self._ids.shape != weight.shape[:2]:
                self._ids = None
            if self._decode is not None and self._ids is not None:
                with self._faults.guard("token texts"):
                    self._texts = [
                        [str(self._decode([token])) for token in row] for row in self._ids.tolist()
                    ]
        fetch = start_copy(values)

        def write() -> Iterator:
            with self._faults.guard(TOKEN_WEIGHT.name):
                found = fetch()
                step = now.attempt - int(found.get("skips", 0))
                args = self._writer.shards, step, found["weight"], self._ids, self._texts
                if refused := self._writer.save(lambda: write_tokens(*args)):  # which the writer says
                    self._faults.missing.setdefault(TOKEN_WEIGHT.name, {"step": step, "cause": refused})
            yield from ()

        self._writer.put(write, complete=-1)


@contextlib.contextmanager
def _without_a_trace(model: nn.Module) -> Iterator[None]:
    """A block that may call `model` in evaluation, eagerly: modes, buffers and random numbers are as before."""
    put_back = generators(model)
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    kept = [(b, b._version, b.clone()) for _, own in buffers for b in own.values() if b is not None]
    for module in modes:
        module.training = False
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, own in buffers:
            if any(module._buffers.get(name) is not buffer for name, buffer in own.items()):
                module._buffers.update(own)
        with torch.no_grad():
            for buffer, version, copy in kept:
                if buffer._version != version:
                    buffer.copy_(copy)
        for each in put_back:
            each()


def _autocast_type(device: str) -> str:
    """Name of the type that autocast casts to here, empty where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return ""
    return "float16" if torch.get_autocast_dtype(device) == torch.float16 else "bfloat16"


def _cast(device: str, cast: str):
    return torch.autocast(device, getattr(torch, cast)) if cast else contextlib.nullcontext()


# What a model is called with


def _leaves(value: object, place: str = "") -> list[tuple[str, object]]:
    """What is not a container in arguments, each with its place ("0/1": the second argument)."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return [(place[1:], value)]
    return [leaf for key, part in parts for leaf in _leaves(part, f"{place}/{key}")]


def _rebuilt(leaves: dict[str, Tensor]) -> Arguments:
    """Arguments from their tensors: what was no tensor is left out, or None before one."""
    tree: dict = {}
    for place, value in leaves.items():
        *path, last = place.split("/")
        here = tree
        for key in path:
            here = here.setdefault(key, {})
        here[last] = value

    def made(part: object) -> object:
        if not isinstance(part, dict):
            return part
        if all(key.isdigit() for key in part):
            return [made(part.get(str(i))) for i in range(max(map(int, part)) + 1)]
        return {key: made(each) for key, each in part.items()}

    return tuple(made(tree["0"])) if "0" in tree else (), made(tree["1"]) if "1" in tree else {}


def _first_sequences(args: tuple, kwargs: dict) -> Arguments:
    """Copies of the arguments, of each tensor with one entry for each sequence the first two."""
    tokens = _tokens(args, kwargs)
    if tokens is None:
        raise RuntimeError(
            "the model is called with no tensor of several dimensions, so its sequences are unknown"
        )
    batch = tokens.shape[0]

    def cut(value: object) -> object:
        if isinstance(value, Tensor):
            value = value.detach()
            return (value[:MOST_SEQUENCES] if value.ndim and value.shape[0] == batch else value).clone()
        if isinstance(value, Mapping):
            return type(value)({key: cut(each) for key, each in value.items()})
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(cut(each) for each in value)
        return value

    return tuple(map(cut, args)), {key: cut(each) for key, each in kwargs.items()}


def _tokens(args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor [B, T, ...] that is the batch: `input_ids`, else the first of whole numbers, else the first of all."""
    several = {place: x for place, x in _leaves([args, kwargs]) if isinstance(x, Tensor) and x.ndim > 1}
    named = [x for place, x in several.items() if place.endswith("/input_ids")]
    whole = [x for place, x in several.items() if _is_whole(x) and not place.endswith("_mask")]
    return next(iter([*named, *whole, *several.values()]), None)


def _is_whole(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def _window(mask: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Places of the tokens that are followed, [sequence or 1, token]: as many as may be, from the first of each sequence
    that counts on, for a long one may begin with padding."""
    places = torch.arange(min(tokens, MOST_TOKENS), device=device).unsqueeze(0)
    if mask is None or tokens <= MOST_TOKENS:
        return places
    first = (mask != 0).int().argmax(1, keepdim=True)
    return places + first.clamp_max(tokens - MOST_TOKENS)


def _ids(args: tuple, kwargs: dict, window: Tensor) -> np.ndarray | None:
    """Ids of the followed tokens, int64 [sequence, token]; None where the batch holds no ids."""
    tokens = _tokens(args, kwargs)
    if tokens is None or tokens.ndim != 2 or not _is_whole(tokens) or tokens.shape[1] < window.shape[1]:
        return None
    if int(window.max()) >= tokens.shape[1]:
        return None
    places = window.expand(len(tokens), -1).to(tokens.device)
    return tokens.take_along_dim(places, 1).cpu().numpy().astype(np.int64)
