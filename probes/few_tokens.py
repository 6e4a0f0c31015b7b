"""Two forwards of a model on a few tokens: of an example of its input, or of random numbers."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from probes.parallel import is_parallel, parts_of
from probes.symbols import Untraceable
from probes.tape import Tape, mapped, record_tape
from probes.target import arguments
from probes.trial import inputs

# Items and tokens of the two forwards; the last for a model of a short context.
_SIZES = (((3, 11), (2, 7)), ((3, 16), (2, 8)), ((3, 64), (2, 32)), ((3, 5), (2, 4)))
_OF_IMAGES = ((3, 1), (2, 1))  # how many patches they are cut into shows in the forward
_MORE = 5  # times as many items, where a layer was dropped for all of them

Input = tuple[tuple, dict]


def two_tapes(root: nn.Module, example: object = None) -> tuple[Tape, Tape]:
    """Tapes of the same model with two numbers of items, and of tokens where it takes any. Untraceable, with the reason,
    where it cannot be run."""
    reason = "it is not known what its forward takes"
    for of_size, pair in _tries(root, example):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a forward that nobody asked for
                tapes = _tapes(root, pair, of_size)
                if any(map(_dropped, tapes)):
                    tapes = _tapes(root, [(_MORE * items - 1, tokens) for items, tokens in pair], of_size)
            return tapes
        except Exception as error:
            if pair != _OF_IMAGES:
                reason = f"a forward on a few tokens fails ({type(error).__name__}: {error})".splitlines()[0]
    raise Untraceable(f"{reason}: give record an example= of its input" if example is None else reason)


def _tries(
    root: nn.Module, example: object
) -> Iterator[tuple[Callable[[nn.Module, int, int], Input], Sequence]]:
    """What to try, the likeliest first: inputs of so many items and tokens, and how many."""
    embedded = any(isinstance(m, nn.Embedding) for m in root.modules())
    # Where processes cut sequences up among themselves, a part of another size might raise in some of them, and the others would
    # wait for them.
    cut = parts_of(root)
    for pair, numbers in product(_SIZES, (_numbers,) if embedded else (_vectors, _numbers)):
        yield numbers, tuple((items, tokens * cut) for items, tokens in pair)
    if example is not None:
        args, kwargs = arguments(example)
        yield from _of_example((args, dict(kwargs)))
        return
    for images in _images(root):
        yield images, _OF_IMAGES


def _of_example(given: Input) -> Iterator[tuple[Callable[[nn.Module, int, int], Input], Sequence]]:
    """A few of its items: with fewer tokens, and with as many as there are where it takes no others."""
    several = [x for x in _tensors(given) if x.ndim > 1]
    if not several:
        return
    batch, length = several[0].shape[:2]
    lengths = {x.shape[1] for x in several if x.ndim == 2 and len(x) == batch} | {length}

    def some(root: nn.Module, items: int, tokens: int) -> Input:
        def few(x: Tensor) -> Tensor:
            if x.ndim and len(x) == batch:
                x = x[torch.arange(items, device=x.device) % batch]
            return x[:, :tokens] if tokens and x.ndim > 1 and x.shape[1] in lengths else x

        return mapped(given, few, Tensor)

    fewer = min(*lengths, 11)
    for one, two in ((fewer, max(1, fewer - 4)), (0, 0)):
        yield some, ((3 if one != 3 else 5, one), (2 if two != 2 else 4, two))


def _tensors(tree: object) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(tree, found.append, Tensor)
    return found


def _tapes(
    root: nn.Module, sizes: Sequence[tuple[int, int]], of_size: Callable[[nn.Module, int, int], Input]
) -> tuple[Tape, Tape]:
    if is_parallel(root):  # in a first forward more is done than the model says
        record_tape(root, *of_size(root, *sizes[0]), *sizes[0])
    one, two = (record_tape(root, *of_size(root, *size), *size) for size in sizes)
    counts = _lengths(one), _lengths(two)
    for tape, here, there in ((one, *counts), (two, *reversed(counts))):
        # What does not change with the number of tokens is none.
        changing = [each for each in here if each not in there or one.tokens == two.tokens]
        most = max(changing, key=here.get, default=tape.tokens)
        tape.tokens = most if here[most] > here[tape.tokens] else tape.tokens
    return one, two


def _lengths(tape: Tape) -> Counter:
    """How many tokens streams may have, beside those given as patches and registers are: sizes of second axes where
    modules meet."""
    met = (node.tensor for node, spots in tape.spots.items() for _ in spots)
    return Counter(x.shape[1] for x in met if x.is_floating_point() and x.ndim == 3 and len(x) == tape.items)


def _dropped(tape: Tape) -> bool:
    """Whether random numbers have made something nothing, as stochastic depth does: what is made of that cannot be told."""
    drawn = sum(1 << node.index for node in tape.nodes if node.draws)
    return any(
        tape.behind[node.index] & drawn and not node.value.any()
        for node in tape.nodes
        if node.tensor.is_floating_point() and node.tensor.numel() >= tape.items * tape.tokens
    )


# What a model may be called with, for every argument that must be given


def _numbers(root: nn.Module, items: int, tokens: int) -> Input:
    sizes = [m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding)]
    most = max(min(sizes or [len(p) for p in _matrices(root)]), 2)
    given = torch.randint(most, (items, tokens), generator=_generator())
    return (given.to(next(root.parameters()).device),) * _needed(root), {}


def _vectors(root: nn.Module, items: int, tokens: int) -> Input:
    given = torch.randn(items, tokens, _matrices(root)[0].shape[-1], generator=_generator())
    return (given.to(next(root.parameters())),) * _needed(root), {}


def _images(root: nn.Module) -> Iterator[Callable[[nn.Module, int, int], Input]]:
    """Images of the sizes that it may take."""
    for args, _ in inputs(root):
        if args and args[0].ndim == 4:
            yield lambda root, items, tokens, like=args[0]: (
                (torch.randn(items, *like.shape[1:], generator=_generator()).to(like),),
                {},
            )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _matrices(root: nn.Module) -> list[nn.Parameter]:
    return [p for p in root.parameters() if p.ndim == 2] or [next(root.parameters())]


def _needed(root: nn.Module) -> int:
    parameters = inspect.signature(root.forward).parameters.values()
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return max(1, len(needed))
