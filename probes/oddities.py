"""What is odd about a model with found depth reads: things seen in real code that are survived, and named."""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest

from torch import nn

from probes.columns import agree
from probes.tape import Node, Tape
from probes.walks import Mix


def oddities(
    tape: Tape,
    reads: Sequence[Mix],
    final: Node | None,
    terms: Callable[[Node], list[Node]],
    members_of: Callable[[Node], tuple[int, ...]],
    carried: Callable[[Node], Node],
) -> list[str]:
    """A clause for each; `terms` takes a plain sum apart, `members_of` numbers the layers whose outputs a source sums,
    `carried` is the state that a mix is handed on in."""
    last = max(reads, key=lambda mix: len(mix.edges))
    members = [members_of(source) for source in last.sources]
    notes = []
    twice = [mix for mix in reads if len(set(mix.sources)) < len(mix.sources)]
    if twice:
        notes.append(f"duplicate sources: {len(twice)} reads list the same tensor twice")
    zero = [mix for mix in reads if any(not source.value.any() for source in mix.sources)]
    if zero:
        notes.append(f"zero sources: {len(zero)} reads weigh a tensor of zeros")
    if any(set(a) < set(b) for a, b in pairwise(members) if a):
        notes.append("cumulative sources: a later source sums an earlier one again")
    mixes = {mix.node for mix in reads}
    holding = {s for mix in reads for s in mix.sources if s not in mixes and mixes & {*terms(s)}}
    if holding:
        notes.append(
            f"sources that hold a read: {len(holding)} are an earlier read's mix with what layers added to it; their "
            "column names these layers alone"
        )
    columns = zip_longest(*([members_of(source) for source in mix.sources] for mix in reads), fillvalue=())
    if not all(map(agree, columns)):
        notes.append("reads of different sources: a column counts places among the sources of its read")
    detached = {
        edge.source
        for mix in reads
        for edge in mix.edges
        if not edge.user.slots[edge.slot].tensor.requires_grad
        and edge.user.tensor.requires_grad
        and edge.source.value.any()
    }
    if detached and any(p.requires_grad for p in tape.root.parameters()):
        notes.append(f"detached sources: {len(detached)} sources let no gradient through")
    states = {mix.node: carried(mix.node) for mix in reads if mix.edges}
    parts = [node for node, state in states.items() if not _same(node, state)]
    if parts:
        notes.append(
            f"reads that are part of a state: to {len(parts)} of them something else is added, or they are gated; the "
            "weights are the reads' own"
        )
    if final is not None and final not in {*states, *states.values()}:
        count = len(terms(final))
        made = f"a plain sum of {count}" if count > 1 else "what the last layer makes"
        notes.append(f"no final read: the final state is {made}")
    again = {m.name for m in tape.moments if m.turn and any(p.ndim > 1 for p in m.module.parameters())}
    outer = [name for name in sorted(again) if not any(name.startswith(f"{other}.") for other in again)]
    if outer:
        notes.append(f"runs several times in one forward: {', '.join(outer[:4])}")
    called = {moment.module for moment in tape.moments}
    silent = [
        name
        for name, module in tape.root.named_modules()
        if module not in called
        and any(child in called for child in module.modules())
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    if silent:
        notes.append(f"never called themselves, only the modules in them: {', '.join(silent[:4])}")
    if any(mix.law is not None and mix.law.gain is not None for mix in reads):
        notes.append("reads fused with the norm after them: the states are those behind it")
    if any(mix.normalised for mix in reads):
        notes.append("normalised values: the weights are those of the normalised sources")
    return notes


def _same(one: Node, two: Node) -> bool:
    return one.tensor.numel() == two.tensor.numel() and bool(
        (one.value.flatten() == two.value.flatten()).all()
    )
