"""What the columns of found reads stand for: which layers' outputs the sources there sum."""

from collections.abc import Iterable, Sequence
from itertools import combinations

from probes.layout import Source
from probes.sites import LayerSite


def columns_of(
    reads: Sequence[Sequence[tuple[int, ...]]], layers: Sequence[LayerSite], constant: int
) -> tuple[Source, ...]:
    """The columns. `reads` has for each source of each read the layers whose outputs it sums (0: the embedding), oldest
    first; the first `constant` of them are the same for every token."""
    count = max(1, *map(len, reads))
    inside: list[set[int]] = [set() for _ in range(count)]
    for read in reads:
        for column, members in enumerate(read):
            inside[column] |= set(members)
    inside[constant:] = [inside[constant] | {0}, *inside[constant + 1 :]] if count > constant else []
    full = all(len(members) <= 1 for members in inside)
    columns = [_constant(number, constant) for number in range(constant)]
    for column, members in enumerate(inside[constant:]):
        first, last = (min(members), max(members)) if members else (column, column)
        if column == count - constant - 1 and not full:
            last = len(layers)  # what the last block still gets after the last read
        if column == 0 and members == {0}:
            columns.append(Source("embedding", "embedding", 0, 0))
        elif full and members:
            columns.append(_of_layer(layers[first - 1]))
        elif (
            members
            and 0 not in members
            and agree(read[column + constant] for read in reads if len(read) > column + constant)
        ):
            which = f"layers {first}–{last}" if last > first else f"layer {first}"
            columns.append(Source(f"depth block {column} ({which})", "depth block", first, last))
        else:
            columns.append(Source(f"source {column}", "depth block", first, last))
    if full:  # the last layers' outputs are sources too, though no read has them
        columns += map(_of_layer, layers[len(columns) - constant - 1 :])
    return tuple(columns)


def agree(column: Iterable[tuple[int, ...]]) -> bool:
    """Whether the sources of one column, of several reads, have layers in common: then it is a depth block that grows."""
    return all(set(a) & set(b) for a, b in combinations(filter(None, column), 2))


def _of_layer(site: LayerSite) -> Source:
    return Source(site.layer.label, site.layer.kind, site.layer.index, site.layer.index)


def _constant(number: int, count: int) -> Source:
    label = "learned vector" if count == 1 else f"learned vector {number + 1}"
    return Source(label, "embedding", 0, 0)
