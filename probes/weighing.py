"""Which weights of a weighted sum are one read's own.

The weights of a read are made together: of the same scores, as by a softmax, or of the same parameters. What is added to
a read, gates it, or scales a source before it is read, is made otherwise, and is no part of it.
"""

from dataclasses import dataclass, field
from itertools import combinations

from probes.tape import Node
from probes.walks import Edge, Mix, Walks, same_values


@dataclass
class _Together:
    """Steps that weigh together: what their weights are made of, `scores` by token and parameters."""

    steps: set[Node]
    scores: set[Node]
    parameters: set[Node]
    keys: set[Node]  # what they are made of among that which is mixed
    cut: Mix | None = field(default=None)

    def joined(self, other: "_Together") -> "_Together":
        return _Together(
            self.steps | other.steps,
            self.scores | other.scores,
            self.parameters | other.parameters,
            self.keys | other.keys,
        )

    def shares(self, other: "_Together") -> bool:
        return bool(self.scores & other.scores)


def reads_in(walks: Walks, mix: Mix) -> list[Mix]:
    """The reads that a weighted sum is made of, the innermost first: mostly it is one itself. Empty where no weights
    belong together, as in streams that are carried on with weights."""
    groups = _united(_weighing(walks, mix), _Together.shares)
    for group in groups:
        group.cut = _cut(walks, mix, group)
    groups = [group for group in groups if group.cut is not None]
    alone = [group for group in groups if len(group.cut.edges) < 2]
    if len(alone) > 1:  # weighed one by one
        several = [group for group in groups if group not in alone]
        united = _united(alone, lambda a, b: _alike(a, b) and not _in_series(mix, a, b))
        for group in united:
            group.cut = _cut(walks, mix, group)
        groups = several + [group for group in united if group.cut is not None]
    best = [group for group in groups if _is_keyed(group)]
    if not best:
        whole = [group for group in groups if group.cut.node is mix.node or group.keys]
        best = sorted((g for g in whole if not _carries_on(walks, mix, g)), key=lambda g: -len(g.cut.edges))[
            :1
        ]
    cuts = {group.cut.node: group.cut for group in best}
    return sorted(cuts.values(), key=lambda cut: cut.node.index)


def _weighing(walks: Walks, mix: Mix) -> list[_Together]:
    """Each step that weighs, by itself."""
    stops = {*mix.steps, *(edge.source for edge in mix.edges), *(e.user.slots[e.slot] for e in mix.edges)}
    sources = {edge.user.slots[edge.slot]: edge.source for edge in mix.edges}
    inside = sum(1 << node.index for node in stops)
    found = []
    for node, operands in mix.steps.items():
        others = [] if node in mix.passed else walks.weighs(node, operands)
        if not others:
            continue
        made, parameters, keys, waiting = set(), set(), set(), list(others)
        while waiting:
            each = waiting.pop()
            if each in stops:
                keys.add(each)
                continue
            if each in made or each in walks.mixed:
                continue
            made.add(each)
            if each.func is None:
                parameters.add(each)
            waiting += each.slots
        waiting = list(keys)
        while waiting:
            each = waiting.pop()
            below = [each.slots[slot] for slot, _ in mix.steps.get(each, ())]
            below += [sources[each]] if each in sources else []
            waiting += [child for child in below if child not in keys]
            keys.update(below)
        scores = {e for e in made if e.func is not None} - _behind_vectors(walks, made)
        by_token = {e for e in scores if walks.tape.behind[e.index] & inside}
        found.append(_Together({node}, by_token or scores, parameters, keys))
    return found


def _behind_vectors(walks: Walks, made: set[Node]) -> set[Node]:
    """Those that have channels, and what these are made of, as the size of a key."""
    found, waiting = set(), [x for x in made if x.tensor.is_floating_point() and walks.axes_of(x)]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += [slot for slot in each.slots if slot in made]
    return found


def _united(groups: list[_Together], alike) -> list[_Together]:
    groups = list(groups)
    while True:
        pair = next(((a, b) for a, b in combinations(groups, 2) if alike(a, b)), None)
        if pair is None:
            return groups
        groups = [group for group in groups if group not in pair] + [pair[0].joined(pair[1])]


def _alike(one: _Together, two: _Together) -> bool:
    """Whether weights of single sources are of one read: by the same parameters, or none of the sources has a say."""
    return bool(one.parameters & two.parameters) or not (one.keys or two.keys)


def _in_series(mix: Mix, one: _Together, two: _Together) -> bool:
    """Whether one is applied to what the other has weighed."""
    return any(_leads(mix, a.steps)[node] for a, b in ((one, two), (two, one)) for node in b.steps - a.steps)


def _is_keyed(group: _Together) -> bool:
    """Whether every source has a say in its weight, as keys have."""
    sources = [s for s in group.cut.sources if s.value.any()]
    return bool(group.keys) and group.keys.issuperset(sources)


def _carries_on(walks: Walks, mix: Mix, group: _Together) -> bool:
    """Whether what it weighs are themselves weighted sums of the same whole, as streams are that layers mix."""
    return any(
        source in mix.steps and len(_edges_below(mix, source)) > 1 and not walks.plain(source)
        for source in group.cut.sources
    )


def _edges_below(mix: Mix, top: Node) -> set[tuple[Node, int]]:
    edges = {(edge.user, edge.slot) for edge in mix.edges}
    found, waiting, done = set(), [top], set()
    while waiting:
        node = waiting.pop()
        if node in done or node not in mix.steps:
            continue
        done.add(node)
        found |= {(node, slot) for slot, _ in mix.steps[node] if (node, slot) in edges}
        waiting += [node.slots[slot] for slot, _ in mix.steps[node] if (node, slot) not in edges]
    return found


def _leads(mix: Mix, steps: set[Node]) -> dict[Node, bool]:
    """Of each node on the way whether it is one of `steps` or made of one."""
    leads: dict[Node, bool] = {}
    for node in sorted(mix.steps, key=lambda each: each.index):
        children = (node.slots[slot] for slot, _ in mix.steps[node])
        leads[node] = node in steps or any(leads.get(child, False) for child in children)
    return leads


def _cut(walks: Walks, mix: Mix, group: _Together) -> Mix | None:
    """The part of `mix` that a group weighs: from where its weights have all been applied down to what they are applied
    to. None where that is no state, or mixes what it is applied to in another way."""
    leads = _leads(mix, group.steps)
    edges = {(edge.user, edge.slot): edge for edge in mix.edges}
    head = node = mix.node
    above = False  # whether something else has been done since
    while node not in group.steps:
        ways = {
            node.slots[s] for s, _ in mix.steps[node] if (node, s) not in edges and leads.get(node.slots[s])
        }
        if len(ways) != 1:
            break
        carrying = [s for s, _ in mix.steps[node] if (node, s) in edges or node.slots[s] in mix.steps]
        above |= len(carrying) > 1 or node in mix.passed or bool(walks.weighs(node, mix.steps[node]))
        above |= len(carrying) == 1 and _scales(node, node.slots[carrying[0]])
        node = ways.pop()
        if above and walks.is_stream(node):
            head, above = node, False
    if above or not walks.is_stream(head):
        return None
    return _below(walks, mix, head, leads, edges)


def _scales(node: Node, child: Node) -> bool:
    """Whether something that is no weight, a constant or dropout, changes the size of what was weighed."""
    return node.tensor.shape == child.tensor.shape and not same_values(node, child)


def _below(
    walks: Walks, mix: Mix, head: Node, leads: dict[Node, bool], edges: dict[tuple[Node, int], Edge]
) -> Mix | None:
    cut = Mix(head, {}, [], law=mix.law, heads=mix.heads)
    waiting = [head]
    while waiting:
        node = waiting.pop()
        if node in cut.steps:
            continue
        cut.steps[node] = mix.steps[node]
        if node in mix.passed:
            cut.passed.add(node)
        for slot, axis in mix.steps[node]:
            child = node.slots[slot]
            if (node, slot) in edges:
                cut.edges.append(edges[node, slot])
            elif child not in mix.steps:
                continue
            elif leads[child]:
                waiting.append(child)
            elif child.tensor.numel() <= walks.size and child not in mix.passed:
                cut.edges.append(Edge(node, slot, axis, walks.bare(child)))
            else:
                operands = mix.steps[child]
                if child not in mix.passed and walks.weighs(child, operands):
                    if len(operands) != 1 or not walks.each_by_itself(child, operands[0][0]):
                        return None
                    cut.passed.add(child)
                waiting.append(child)
    return cut.in_order(walks.is_constant)
