"""Blocks that do not add to one stream but mix several, as hyper-connections do: which norm feeds which sublayer.

A layer's state is still what its norm receives, and its output what the sublayer returns; how states come about is told
by the recovered mixing (mixing.py).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx, nn

from probes.flow import Call
from probes.nodes import ancestors, has_matrix, keeps, normalises
from probes.recipes import Recipe, Recipes
from probes.symbols import OTHER_STREAMS, OTHER_TOKENS, STREAMS, TOKENS, Recording, Untraceable


@dataclass(frozen=True)
class Layer:
    """The call of a norm and those that it feeds, one by the other; the output of the last is what the layer makes.
    `read` names the call whose output is, in part, what the norm is given; None where it is given something else. Of a
    norm that is a function (`norm` is None) `state` is what it is given, where a call returns that, or how it is made."""

    norm: Call | None
    fed: tuple[Call, ...]
    read: str | None
    state: Call | Recipe | None = None


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
        reading = _Reading(module, TOKENS, OTHER_TOKENS)
    except Untraceable:
        reading = _Reading(module, STREAMS, OTHER_STREAMS)
    layers = reading.layers()
    if not layers or not reading.passes_by({call.name for layer in layers for call in layer.fed}):
        raise Untraceable("it does not mix what sublayers make into what it is given")
    return Feeding(reading.argument, layers)


class _Reading:
    def __init__(self, module: nn.Module, shape: torch.Size, other: torch.Size):
        recording = Recording(module, {module}, optional=False, shape=shape)
        self._recipes = Recipes(recording, partial(Recording, module, {module}, False, other))
        self._nodes = recording.graph.nodes
        self.argument = recording.argument
        self._stream, self._results = recording.stream, recording.results.values()
        self._modules = {name: module for module, name in recording.names.items()}
        calls = [node for node in recording.graph.nodes if node.op == "call_module"]
        targets = [node.target for node in calls]
        self.calls = [node for node in calls if targets.count(node.target) == 1]

    def layers(self) -> tuple[Layer, ...]:
        found = (self._layer(node) for node in self._nodes if normalises(node) or node in self.calls)
        return tuple(layer for layer in found if layer is not None)

    def _layer(self, node: fx.Node) -> Layer | None:
        """That of a norm; None for something else, or that feeds nothing with a matrix."""
        norm, called, fed = None, node, []
        if node.op == "call_module":
            norm = self._modules[node.target]
            if has_matrix(norm) or list(norm.children()) or not list(norm.parameters()):
                return None
        while (following := self._following(node)) is not None:
            node = following
            keys = [user.args[1] for user in node.users if _takes_part(user)]
            fed.append(Call(node.target, self._modules[node.target], min(keys, default=0)))
        if not any(has_matrix(call.module) for call in fed) or self._goes_on(node):
            return None
        if norm is not None:
            return Layer(Call(called.target, norm), tuple(fed), self._read(called))
        return Layer(None, tuple(fed), None, self._state(called.args[0]))

    def _state(self, node: fx.Node) -> Call | Recipe | None:
        recipe = self._recipes.of(node)
        if recipe is not None and len(recipe.leaves) == 1 and isinstance(recipe.leaves[0], Call):
            given, key = node, 0
            while keeps(given, self._modules):
                given = given.all_input_nodes[0]
            if _takes_part(given):
                given, key = given.args
            if given in self.calls:
                return Call(given.target, self._modules[given.target], key)
        return recipe

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

    def _goes_on(self, node: fx.Node) -> bool:
        """Whether another call with a matrix is given but a function of it, as what an activation makes."""
        users = self._users(node)
        while len(users) == 1 and users[0].op != "call_module" and len(users[0].all_input_nodes) == 1:
            users = self._users(users[0])
        return any(user in self.calls and has_matrix(self._modules[user.target]) for user in users)

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """Who uses it, as it is or the part of it that is a tensor."""
        users = []
        for user in node.users:
            through = _takes_part(user) or (user.op != "call_module" and keeps(user, self._modules))
            users += self._users(user) if through else [user]
        return users


def _takes_part(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)
