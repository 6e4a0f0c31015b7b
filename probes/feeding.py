"""Blocks that do not add to a stream but mix several, as hyper-connections do: which norm feeds which sublayer.

What is received and returned by the sublayers is a layer's state and output all the same; how states come about is then
told by the recovered mixing (mixing.py).
"""

from dataclasses import dataclass

from torch import fx, nn

from probes.flow import Call
from probes.nodes import ancestors, has_matrix, keeps
from probes.symbols import STREAMS, TOKENS, Recording, Untraceable


@dataclass(frozen=True)
class Feeding:
    """What one forward feeds: the argument that carries its streams, and norms with what they feed, in order."""

    argument: str
    pairs: tuple[tuple[Call, Call], ...]


def feeding(module: nn.Module) -> Feeding:
    """Followed once on symbols. Untraceable where that fails or no norm feeds a sublayer."""
    try:
        recording = Recording(module, {module}, optional=False, shape=STREAMS)
    except Untraceable:
        recording = Recording(module, {module}, optional=False, shape=TOKENS)
    modules = {name: child for child, name in recording.names.items()}
    calls = [node for node in recording.graph.nodes if node.op == "call_module"]
    once = [node for node in calls if sum(other.target == node.target for other in calls) == 1]
    pairs = []
    for node in once:
        norm = modules[node.target]
        fed = [user for user in _users(node, modules) if user in once and has_matrix(modules[user.target])]
        if has_matrix(norm) or not list(norm.parameters()) or len(fed) != 1:
            continue
        ...
