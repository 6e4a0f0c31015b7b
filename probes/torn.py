"""Graphs that the compiler ends within a layer: what such a graph is given goes on elsewhere, and so does its gradient.

A tap on what a compiled graph is given sees the gradient that this graph makes, and no other's. That is all of it where the
graph holds the whole layer, as in a block that is compiled by itself.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext

Row = tuple[str, int]

_numbers = itertools.count()
_attempts: dict[object, int] = {}
# By graph, the names of what it taps, and of those what it is given.
_tapped: dict[object, set[str]] = defaultdict(set)
_given: dict[object, set[str]] = defaultdict(set)


def names_of(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """A name for each row of each place, that no other model's have. Texts, for the compiler would make symbols of numbers."""
    number = next(_numbers)
    return {place: [f"{number} {place} {row}" for row in range(size)] for place, size in sizes.items()}


def note(x: Tensor, name: str) -> None:
    """That the compiler follows a gradient tap on `x`. Only while it makes its graph is anything noted; of a graph that it makes
    anew, what the last attempt met."""
    with contextlib.suppress(AttributeError):  # none of that is told where nothing is being compiled
        output, trace = InstructionTranslator.current_tx().output, CompileContext.current_trace_id()
        graph = trace.compile_id
        if _attempts.get(graph, -1) < trace.attempt:
            _attempts[graph] = trace.attempt
            _given.pop(graph, None)
            _tapped.pop(graph, None)
        _tapped[graph].add(name)
        if any(
            node.op == "placeholder" and node.meta.get("example_value") is x for node in output.graph.nodes
        ):
            _given[graph].add(name)


def torn(names: Mapping[str, list[str]], reads: bool) -> set[Row]:
    """Rows whose gradients some graph sees but in part. A state of a plain stream goes on beside its layer; where the model has
    depth `reads`, the embedding goes on to the last of them."""
    if not _given:
        return set()
    states, outputs = names["state"], names["output"]
    # What goes on, and what is tapped where it has gone by.
    if reads:
        pairs = {("output", 0): states[len(outputs) - 1]}
    else:
        pairs = {("state", row): name for row, name in enumerate(outputs[1:])}
    found: set[Row] = set()
    for graph, given in _given.items():
        found |= {
            row
            for row, beside in pairs.items()
            if names[row[0]][row[1]] in given and beside not in _tapped[graph]
        }
    return found | ({("output", 0)} if ("state", 0) in found else set())
