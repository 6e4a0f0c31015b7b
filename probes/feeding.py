"""Blocks that do not add to one stream but mix several, as hyper-connections do: which norm feeds which sublayer.

A layer's state is still what its norm receives, and its output what the sublayer returns; how states come about is told
by the recovered mixing (mixing.py).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from probes.flow import Call
from probes.nodes import ancestors, has_matrix, keeps
from probes.symbols import STREAMS, Recording, Untraceable


@dataclass(frozen=True)
class Layer:
    """The call of a norm and those that it feeds, one by the other; the output of the last is what the layer makes.
    `read` names the call whose output is, in part, what the norm is given; None where it is given something else."""

    norm: Call
    fed: tuple[Call, ...]
    read: str | None


@dataclass(frozen=True)
class Feeding:
    """Layers in order; `argument` carries the streams."""

    argument: str
    layers: tuple[Layer, ...]

    def reads(self, states: Sequence[Call | None]) -> bool:
        """Whether `states`, the calls that receive what looks like the state of each layer, only read it from streams for
        the norm of the layer."""
        return [layer.read for layer in self.layers] == [state.name if state else "" for state in states]


def feeding(module: nn.Module) -> Feeding:
    """What one forward, followed on symbols, feeds. Untraceable where it cannot be followed, no norm feeds a sublayer, or
    what it is given goes nowhere but through the sublayers."""
    try:
        reading = _Reading(Recording(module, {module}, optional=False))
    except Untraceable:
        reading = _Reading(Recording(module, {module}, optional=False, shape=STREAMS))
    layers = tuple(layer for node in reading.calls if (layer := reading.layer(node)) is not None)
    if not layers or not reading.passes_by({call.name for layer in layers for call in layer.fed}):
        raise Untraceable("it does not mix what sublayers make into what it is given")
    return Feeding(reading.argument, layers)


class _Reading:
    def __init__(self, recording: Recording):
        self.argument = recording.argument
        self._stream, self._results = recording.stream, recording.results.values()
        self._modules = {name: module for module, name in recording.names.items()}
        calls = [node for node in recording.graph.nodes if node.op == "call_module"]
        targets = [node.target for node in calls]
        self.calls = [node for node in calls if targets.count(node.target) == 1]

    def layer(self, node: fx.Node) -> Layer | None:
        """That of a norm's call; None for a call of something else, or that feeds nothing with a matrix."""
        norm, called, fed = self._modules[node.target], node, []
        if has_matrix(norm) or list(norm.children()) or not list(norm.parameters()):
            return None
        while (following := self._following(node)) is not None:
            node = following
            keys = [user.args[1] for user in node.users if _takes_part(user)]
            fed.append(Call(node.target, self._modules[node.target], min(keys, default=0)))
        if not any(has_matrix(call.module) for call in fed):
            return None
        return Layer(Call(called.target, norm), tuple(fed), self._read(called))

    def passes_by(self, names: set[str]) -> bool:
        """Whether what is given reaches the result without the calls of those names."""
        waiting, seen = list(self._results), set()
        while waiting:
            node = waiting.pop()
            if node is self._stream:
                return True
            if node not in seen and node.target not in names:
                seen.add(node)
                waiting += node.all_input_nodes
        return False

    def _read(self, node: fx.Node) -> str | None:
        (given, *others) = node.all_input_nodes
        while not others and given.op != "call_module" and keeps(given, self._modules):
            (given, *others) = given.all_input_nodes
        if others or not _takes_part(given) or given.args[0] not in self.calls:
            return None
        return given.args[0].target

    def _following(self, node: fx.Node) -> fx.Node | None:
        """The only call that is given what this one returns; None where there are others, where something comes between,
        or where it is given what carries the streams, too."""
        users = self._users(node)
        if len(users) != 1 or users[0] not in self.calls:
            return None
        others = [each for each in users[0].all_input_nodes if node not in {each, *ancestors(each)}]
        return None if any(self._stream in {each, *ancestors(each)} for each in others) else users[0]

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """Who uses it, as it is or the part of it that is a tensor."""
        users = []
        for user in node.users:
            through = _takes_part(user) or (user.op != "call_module" and keeps(user, self._modules))
            users += self._users(user) if through else [user]
        return users


def _takes_part(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)
