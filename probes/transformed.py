"""Sources that are normalised, projected or scaled one by one before a read weighs them."""

from probes.tape import Node
from probes.walks import Edge, Mix, Walks


def before_this_read(walks: Walks, mix: Mix) -> None:
    """Put in the place of each source what it was made of, where all were made anew for this read, in the same way."""
    made = mix.sources
    if len(set(made)) < 2 or mix.node.opaque:
        return
    found = _before(made)
    if found is None or min(each.index for each in made) < max(each.index for each in found):
        return
    if any(each.tensor.shape != before.tensor.shape for each, before in zip(made, found, strict=True)):
        return
    mix.edges = [
        Edge(edge.user, edge.slot, edge.axis, before) for edge, before in zip(mix.edges, found, strict=True)
    ]
    mix.passed.update(made)
    mix.in_order(walks.is_constant)


def _before(made: list[Node]) -> list[Node] | None:
    """The nodes behind `made` down to which all were made in the same way, if those are one of each."""
    ends: dict[tuple[Node, ...], None] = {}
    waiting = [tuple(made)]
    done = set()
    while waiting:
        row = waiting.pop()
        if row in done:
            continue
        done.add(row)
        if len(set(row)) == 1:
            continue  # the same for all
        if not _alike(row):
            ends[row] = None
            continue
        waiting += zip(*(node.slots for node in row), strict=True)
    if len(ends) != 1 or tuple(made) in ends:
        return None
    return list(next(iter(ends)))


def _alike(row: tuple[Node, ...]) -> bool:
    first = row[0]
    return first.func is not None and all(
        node.func is first.func and len(node.slots) == len(first.slots) and node.pick == first.pick
        for node in row
    )
