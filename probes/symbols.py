"""The record of one forward, executed on symbols with its children left closed: which call got what from where."""

import copy
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn import functional as F

from probes.nodes import argument, has_matrix

_TORCHS_OWN = frozenset(vars(nn.Module()))  # parameters, hooks and the like
_CONTAINERS = list, dict, set, deque, OrderedDict, defaultdict
_OF_LISTS = {"append", "extend", "insert", "pop"}
_SPLITTING = {torch.chunk, torch.tensor_split, "chunk", "tensor_split"}


class Untraceable(Exception):
    """The forward does not say what it adds to the stream; the message says where it was lost."""


TOKENS = torch.Size((2, 8, 64))
OTHER_TOKENS = torch.Size((3, 10, 96))
STREAMS = torch.Size((2, 8, 4, 64))
"""Of blocks that are given several streams, [B, T, n, D]."""
OTHER_STREAMS = torch.Size((3, 10, 4, 96))


class _Symbol(fx.Proxy):
    """Some tensor; its sizes are made up."""

    dtype = torch.float32
    device = torch.device("cpu")
    is_nested = False
    is_cuda = False

    @property
    def shape(self) -> torch.Size:
        return self.tracer.shape[:2] if self.tracer.tokens and _is_index(self.node) else self.tracer.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None):
        return self.shape if axis is None else self.shape[axis]

    def __getattr__(self, name: str):
        if name in _OF_LISTS:
            raise Untraceable("it is given a list")
        return super().__getattr__(name)

    def __add__(self, other: object):
        return _with_no_list(other, super().__add__)

    def __radd__(self, other: object):
        return _with_no_list(other, super().__radd__)


def _with_no_list(other: object, add: Callable) -> fx.Proxy:
    """A list is lengthened by `+`, which is no sum."""
    if isinstance(other, list | tuple):
        raise Untraceable("it is given a list")
    return add(other)


def _is_index(node: fx.Node) -> bool:
    """Whether it is an argument, or made of arguments alone and by no module, as tokens are."""
    if node.op == "placeholder":
        return True
    made = node.op in ("call_function", "call_method") and node.target is not F.embedding
    return made and all(map(_is_index, node.all_input_nodes))


class Recording(fx.Tracer):
    """The record of one forward: `graph`, and by node the module called."""

    def __init__(
        self,
        module: nn.Module,
        opened: set[nn.Module],
        optional: bool,
        shape: torch.Size = TOKENS,
        tokens: bool = False,
    ):
        """`optional` says whether arguments that may be left out (None) are given, `shape` what size tensors claim, `tokens`
        that arguments are these, [B, T]: then modules with matrices are recorded that are given positions, too."""
        super().__init__()
        self.shape, self.tokens = shape, tokens
        self.root = module
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs: dict = {}
        self.names = {child: name for name, child in module.named_modules()}
        self.opened = opened
        parameters = list(inspect.signature(module.forward).parameters.values())
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not plain:
            raise Untraceable("its forward takes no argument by name")
        self.argument = plain[0].name
        self.positions = [p.name for p in plain]
        given = [
            p for p in plain if p is plain[0] or p.default is p.empty or (optional and p.default is None)
        ]
        symbols = {p: self.create_proxy("placeholder", p.name, (), {}) for p in given}
        positional = [symbols[p] for p in given if p.kind is p.POSITIONAL_ONLY]
        named = {p.name: symbols[p] for p in given if p.kind is not p.POSITIONAL_ONLY}
        self.stream = symbols[plain[0]].node
        with self._calls_recorded(), undisturbed(opened):
            try:
                result = module.forward(*positional, **named)
                self.results = self._results(result)
            except Exception as error:
                raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module not in self.opened

    def to_bool(self, symbol: fx.Proxy) -> bool:
        # A branch on numbers that nobody has yet: such branches guard against overflow and the like.
        return False

    def iter(self, symbol: fx.Proxy) -> Iterator[fx.Proxy]:
        parts = argument(symbol.node, 1, "chunks", None)
        if symbol.node.target in _SPLITTING and isinstance(parts, int):
            return iter([symbol[index] for index in range(parts)])
        return super().iter(symbol)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def path_of_module(self, module: nn.Module) -> str:
        try:
            return self.names[module]
        except KeyError:
            raise Untraceable(f"a {type(module).__name__} is called that is not below it") from None

    @contextmanager
    def _calls_recorded(self) -> Iterator[None]:
        real = nn.Module.__call__

        def call(module, *args, **kwargs):
            given = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
            if given or (self.tokens and module in self.names and has_matrix(module)):
                return self.call_module(module, module.forward, args, kwargs)
            return real(module, *args, **kwargs)

        nn.Module.__call__ = call
        try:
            yield
        finally:
            nn.Module.__call__ = real

    @staticmethod
    def _results(result: object) -> dict[int, fx.Node]:
        """What the forward returns that was made from its input, by place among several results."""
        if isinstance(result, dict):
            result = list(result.values())
        several = result if isinstance(result, tuple | list) else [result]
        found = {place: each.node for place, each in enumerate(several) if isinstance(each, fx.Proxy)}
        if not found:
            raise Untraceable("it returns nothing made from its input")
        return found


def reseed(device: torch.device) -> None:
    """Random numbers of the CPU and of `device` begin anew. `torch.manual_seed` would reach every device, one that is
    not in use yet too, and nobody would put those back."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    elif device.type == "mps":
        torch.mps.manual_seed(0)


@contextmanager
def undisturbed(opened: set[nn.Module]) -> Iterator[None]:
    """Whatever the forward keeps on the modules it runs in is put back, in lists, dicts and sets too, and so are random
    numbers."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in opened]
    held = [
        (value, copy.copy(value))
        for module in opened
        for key, value in vars(module).items()
        if type(value) in _CONTAINERS and key not in _TORCHS_OWN
    ]
    buffers = [b for module in opened for b in module.buffers(recurse=False) if not b.is_meta]
    before = [b.clone() for b in buffers]
    devices = {p.device for module in opened for p in module.parameters(recurse=False) if p.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)), torch.no_grad():
        try:
            yield
        finally:
            for module, attributes, own in kept:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(own)
            for value, inside in held:
                value.clear()
                value.extend(inside) if isinstance(value, list | deque) else value.update(inside)
            for buffer, values in zip(buffers, before, strict=True):
                buffer.copy_(values)
