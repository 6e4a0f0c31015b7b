"""The tape of one real forward: every operation on tensors, in order, and every call of a module.

Nothing is guessed from classes or source: the forward is run as it is, on a few tokens, and what it did is kept with
the values it saw, so that questions about it can be answered by trying.
"""

import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from probes.found import Moment, Spot
from probes.parallel import is_let_go, is_parallel, reshard
from probes.symbols import undisturbed


@dataclass(eq=False)
class Node:
    """One tensor of the forward: what `func` made of `args`, in which other nodes stand for tensors. Without `func` it
    came from outside: a parameter, a buffer, an input. Of several results it is number `pick`; `writes` says that
    `func` overwrites its first argument."""

    index: int
    tensor: Tensor
    func: Callable | None = None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    pick: int | None = None
    writes: bool = False
    kept: Tensor | None = None  # its values, where something overwrote them later
    opaque: bool = False  # a kernel made it that shows no operation
    draws: bool = False  # random numbers were drawn for it
    cast: tuple | None = (
        None  # of the autocast region of the model's own that it was made in: device, type, enabled
    )
    held: tuple[nn.Module, str] | None = None  # which module had it, under what name, when it was used

    def __post_init__(self):
        self.slots: list[Node] = []
        mapped((self.args, self.kwargs), self.slots.append)

    @property
    def value(self) -> Tensor:
        """Its values. Of a parameter that was brought together for the forward alone, as by `fully_shard`, these are gone: others
        take their place, always the same."""
        if self.kept is not None:
            return self.kept
        if not is_let_go(self.tensor):
            return self.tensor.detach()
        if self.func is not None:  # a view of one
            return self.call([each.value for each in self.slots]).detach()
        numbers = torch.randn(self.tensor.shape, generator=torch.Generator().manual_seed(self.index))
        return numbers.to(self.tensor)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter it is; where each process has a part of that, the part that is here."""
        found = None if self.held is None else getattr(*self.held)
        return found if isinstance(found, nn.Parameter) else None

    def call(self, values: list[Tensor]) -> Tensor:
        """What it would be, had the nodes in `slots` these values."""
        given = iter(values)
        args, kwargs = mapped((self.args, self.kwargs), lambda node: next(given))
        return execute(self.func, args, kwargs, self.pick, self.writes)


def execute(func: Callable, args: tuple, kwargs: dict, pick: int | None, writes: bool) -> Tensor:
    if writes:
        args = (args[0].clone(), *args[1:])
    result = func(*args, **kwargs)
    if writes:
        return args[0]
    return result if pick is None else result[pick]


@dataclass
class Tape:
    """`nodes` in order of their making; by node its `spots`; `given` are the tensors the model was called with."""

    root: nn.Module
    nodes: list[Node]
    spots: dict[Node, list[Spot]]
    moments: list[Moment]
    given: list[Node]
    items: int
    tokens: int

    def __post_init__(self):
        self.users: dict[Node, list[Node]] = {}  # without what the model makes for nobody, as copies it keeps
        self.behind: list[int] = []  # by node, the nodes it was made from, as bits
        for node in self.nodes:
            bits = 0
            for each in dict.fromkeys(node.slots):
                bits |= self.behind[each.index] | 1 << each.index
            self.behind.append(bits)
        led = self._leading_to_results()
        for node in self.nodes:
            for each in dict.fromkeys(node.slots if led >> node.index & 1 else ()):
                self.users.setdefault(each, []).append(node)

    def _leading_to_results(self) -> int:
        """What the results of the model were made from, and these, as bits; all, where it returns no tensor."""
        bits = 0
        for node, spots in self.spots.items():
            if any(spot.module is self.root and not spot.before for spot in spots):
                bits |= self.behind[node.index] | 1 << node.index
        return bits or -1

    def made_from(self, node: Node, other: Node) -> bool:
        return bool(self.behind[node.index] >> other.index & 1)

    def ancestors(self, node: Node) -> Iterator[Node]:
        bits = self.behind[node.index]
        return (each for each in self.nodes[: node.index] if bits >> each.index & 1)


class _Running(TorchFunctionMode):
    def __init__(self, names: dict[nn.Module, str]):
        super().__init__()
        self.nodes: list[Node] = []
        self.spots: dict[Node, list[Spot]] = {}
        self.moments: list[Moment] = []
        self._names = names
        self._holders: dict[int, tuple[nn.Module, str]] = {}
        self._turns: dict[nn.Module, int] = {}
        self._newest: dict[int, Node] = {}
        self.casts: list[tuple] = []  # autocast regions that the forward itself has entered
        self._in_custom = False  # within a registered operator, whose own functions tell nothing more
        self._draws = False  # whether the operation that has just run took random numbers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        mapped((args, kwargs), tensors.append, Tensor)
        writes = _may_write(func) and bool(args) and isinstance(args[0], Tensor)
        if writes:
            version = args[0]._version
            before = args[0].detach().clone() if id(args[0]) in self._newest else None
        self._in_custom = _is_custom(func)
        drawn = _drawn_so_far(tensors)
        try:
            result = func(*args, **kwargs)
        finally:
            self._in_custom = False
        self._draws = not all(map(torch.equal, drawn, _drawn_so_far(tensors)))
        if writes and args[0]._version != version:
            if before is not None:
                self._newest[id(args[0])].kept = before
            self._add(args[0], func, args, kwargs, writes=True)
        elif isinstance(result, Tensor):
            if all(result is not each for each in tensors):
                self._add(result, *_plain_call(func, args, kwargs))
        elif isinstance(result, tuple | list) and not isinstance(result, torch.Size):
            for place, each in enumerate(result):
                if isinstance(each, Tensor) and all(each is not other for other in tensors):
                    self._add(each, func, args, kwargs, pick=place)
        return result

    def _add(self, tensor, func, args, kwargs, pick=None, writes=False) -> None:
        args, kwargs = mapped((tuple(args), kwargs), self.node_of, Tensor)
        node = Node(len(self.nodes), tensor, func, args, kwargs, pick, writes, opaque=_is_custom(func))
        node.cast = self.casts[-1] if self.casts else None
        node.draws = self._draws
        self.nodes.append(node)
        self._newest[id(tensor)] = node

    def applied(self, apply: Callable, args: tuple, result: object) -> None:
        """A function with a backward pass of its own has run. Where it filled an empty tensor and no operation was
        seen to do that, a kernel did."""
        for path, tensor in leaves(result) if not self._in_custom else ():
            node = self._newest.get(id(tensor))
            if len(path) < 2 and (node is None or _is_empty(node)):
                self._draws = False
                self._add(tensor, apply, args, {}, pick=path[0] if path else None)
                self.nodes[-1].opaque = True

    def node_of(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._newest:
            node = Node(len(self.nodes), tensor, held=self._holder(tensor))
            self.nodes.append(node)
            self._newest[id(tensor)] = node
        return self._newest[id(tensor)]

    def _holder(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        module, name = self._holders.get(id(tensor), (None, ""))
        if module is None or getattr(module, name, None) is not tensor:
            # Some are there while their module runs, and others in their place before and after.
            self._holders = {
                id(each): (module, name)
                for module in self._names
                for name, each in (*module._parameters.items(), *module._buffers.items())
                if each is not None
            }
        return self._holders.get(id(tensor))

    def visit(self, real: Callable, module: nn.Module, args: tuple, kwargs: dict) -> object:
        if module not in self._names:
            return real(module, *args, **kwargs)
        turn = self._turns[module] = self._turns.get(module, -1) + 1
        self._meet(module, turn, True, (args, kwargs))
        result = real(module, *args, **kwargs)
        self._meet(module, turn, False, result)
        return result

    def _meet(self, module: nn.Module, turn: int, before: bool, values: object) -> None:
        moment = len(self.moments)
        for path, tensor in leaves(values):
            spot = Spot(self._names[module], module, turn, before, path, moment)
            self.spots.setdefault(self.node_of(tensor), []).append(spot)
        self.moments.append(Moment(self._names[module], module, turn, before, len(self.nodes), moment))


def record_tape(root: nn.Module, args: tuple, kwargs: dict, items: int, tokens: int) -> Tape:
    """Run `root` once in training mode and leave it as it was. Whatever its forward raises is raised."""
    running = _Running({module: name for name, module in root.named_modules()})
    real = nn.Module.__call__
    # Where processes share the model, each forward with gradients waits for its backward pass.
    with _as_before(root), torch.set_grad_enabled(not is_parallel(root)):
        root.train()
        nn.Module.__call__ = lambda module, *args, **kwargs: running.visit(real, module, args, kwargs)
        # Below `Function.apply`, which many keep under a name of their own.
        base = torch.autograd.function._SingleLevelFunction

        def applied(function, *args, **kwargs):
            result = super(base, function).apply(*args, **kwargs)
            running.applied(partial(function.apply), args, result)
            return result

        base.apply = classmethod(applied)
        try:
            with (
                _told_of_casts(running.casts),
                _attention_opened(),
                running,
                torch.compiler.set_stance("force_eager"),
            ):
                given = [running.node_of(tensor) for _, tensor in leaves((args, kwargs))]
                root(*args, **kwargs)
        finally:
            nn.Module.__call__ = real
            del base.apply
    return Tape(root, running.nodes, running.spots, running.moments, given, items, tokens)


@contextmanager
def _told_of_casts(casts: list[tuple]) -> Iterator[None]:
    """While inside, `casts` are the autocast regions that have been entered."""
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def entered(self):
        casts.append((self.device, self.fast_dtype, self._enabled))
        return enter(self)

    def left(self, *error):
        casts.pop()
        return leave(self, *error)

    kind.__enter__, kind.__exit__ = entered, left
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave


@contextmanager
def _attention_opened() -> Iterator[None]:
    """While inside, `nn.MultiheadAttention` is the operations it consists of, and not one."""
    real = functional.multi_head_attention_forward

    def opened(*args, **kwargs):
        asks = functional.has_torch_function
        functional.has_torch_function = lambda _: False
        try:
            return real(*args, **kwargs)
        finally:
            functional.has_torch_function = asks

    functional.multi_head_attention_forward = opened
    try:
        yield
    finally:
        functional.multi_head_attention_forward = real


@contextmanager
def _as_before(root: nn.Module) -> Iterator[None]:
    """Modes, buffers, attributes, what lists, dicts and sets on modules hold, and random numbers are put back."""
    modes = {module: module.training for module in root.modules()}
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with undisturbed(set(root.modules())):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        reshard(root)
        random.setstate(python)
        np.random.set_state(numbers)


def mapped(tree: object, of_leaf: Callable, kind: type = Node) -> object:
    """`tree` of lists, tuples, dicts and slices with each leaf of a `kind` replaced."""
    if isinstance(tree, kind):
        return of_leaf(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(each, of_leaf, kind) for each in tree))
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
        return type(tree)(mapped(each, of_leaf, kind) for each in tree)
    if isinstance(tree, dict):
        return {key: mapped(each, of_leaf, kind) for key, each in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(each, of_leaf, kind) for each in (tree.start, tree.stop, tree.step)))
    return tree


def leaves(tree: object, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor in lists, tuples and dicts, and how to get there."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, tuple | list):
        for key, each in enumerate(tree):
            yield from leaves(each, (*path, key))
    elif isinstance(tree, dict):
        for key, each in tree.items():
            yield from leaves(each, (*path, key))


def _drawn_so_far(tensors: list[Tensor]) -> list[Tensor]:
    """The states of the generators that an operation on these tensors may draw from."""
    states = [torch.default_generator.get_state()]
    for index in {each.device.index for each in tensors if each.is_cuda}:
        states.append(torch.cuda.default_generators[index].get_state())
    return states


def _is_empty(node: Node) -> bool:
    """Whether nobody was seen to write to a tensor, or to what it is a view of."""
    while "empty" not in getattr(node.func, "__name__", ""):
        if len(node.slots) != 1 or node.slots[0].tensor.data_ptr() != node.tensor.data_ptr():
            return False
        node = node.slots[0]
    return True


def _is_custom(func: Callable) -> bool:
    """Whether it is an operator that somebody has registered: torch sees no operation in it."""
    if not isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    packet = getattr(func, "overloadpacket", func)
    return packet._qualified_op_name.partition("::")[0] not in ("aten", "prims", "prim")


def _may_write(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.startswith("_")) or name in _WRITING


_WRITING = {
    "__setitem__",
    *(f"__i{name}__" for name in ["add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or"]),
}


def _plain_call(func: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
    """A property read as a call of `getattr`, which can be called anywhere."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr, (args[0], func.__self__.__name__), {}
    if func is Tensor.__getitem__:
        return operator.getitem, args, kwargs
    return func, args, kwargs
