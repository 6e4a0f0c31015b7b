"""The sites of a model whose states are depth reads, found by running it once on a few tokens."""

import logging
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from probes.columns import columns_of
from probes.few_tokens import two_tapes
from probes.found import FoundRead, FoundReads, Replay
from probes.given import Given
from probes.last_state import Ending, parameters_between
from probes.layers import kind_by_name
from probes.layout import Layer, Read
from probes.mixes import Mixes, head_counts, widths
from probes.naming import blocks_of, common_name
from probes.oddities import oddities
from probes.replay import DrawsNumbers, Unreplayable, moment_of, replay_of, witness_of
from probes.seen import Seen
from probes.sites import LayerSite, Place, Sites
from probes.stacks import is_norm
from probes.symbols import Untraceable
from probes.tape import Node, Tape
from probes.walks import Mix, name_of

log = logging.getLogger("depthscope")


def foreign_sites(root: nn.Module, example: object = None) -> Sites:
    """The sites of `root`, which may be called with the `example`. Untraceable, with the reason, where it has no depth reads that can be seen."""
    devices = sorted({p.device for p in root.parameters() if p.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            return _found(root, example)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _found(root: nn.Module, example: object) -> Sites:
    tape, twin = two_tapes(root, example)
    reasons = []
    for width in list(widths(tape))[:2]:
        for heads in (1, *head_counts(tape, width)):
            mixes = Mixes(tape, width, heads)
            if mixes.reason is None:
                return _Finding(tape, twin, mixes).sites()
            reasons.append(mixes.reason)
    raise Untraceable(max(reasons, key=len, default="no module of it hands tokens on"))


class _Finding:
    """Reads the layers and reads off a tape."""

    def __init__(self, tape: Tape, twin: Tape, mixes: Mixes):
        self._tape, self._twin, self._mixes = tape, twin, mixes
        wide = [mix for mix in mixes.found.values() if len(mix.edges) > 1]
        self._embedding = self._find_embedding(wide)
        first = min(wide, key=lambda mix: mix.node.index).node
        every = {**mixes.found, **{n: mix for n, mix in mixes.single.items() if n.index < first.index}}
        self._reads = [
            mix
            for mix in sorted(every.values(), key=lambda mix: mix.node.index)
            if len(mix.edges) > 1 or self._begins(mix)
        ]
        self._final = Ending(tape, mixes, self._embedding, self._reads).state()
        self._outputs = self._find_outputs()
        if not self._outputs:
            raise Untraceable("its depth reads mix nothing that layers make")
        shapes = [output.tensor.shape[:2] for output in self._outputs]
        self._seen = Seen(tape, mixes, 2 * shapes.count((tape.tokens, tape.items)) > len(shapes))
        self._stops = {source for mix in self._reads for source in mix.sources}
        self._stops |= {self._embedding, *self._outputs}
        mixed = [*self._reads, *(m for m in mixes.found.values() if all(map(self._is_known, m.sources)))]
        given = Given(tape, mixes, self._embedding, self._outputs, [m.node for m in mixed], self._stops)
        self._states = [given.to(output) for output in self._outputs]
        self._entries = self._seen.at_parts(self._embedding)
        entries = set(self._entries)
        self._turned = any(
            entries & set(tape.spots[node]) and self._seen.is_turned(node) for node in tape.spots
        )

    def sites(self) -> Sites:
        layers = self._layers()
        rows, reads, failed = self._rows(layers)
        notes = [f"{label}: {error}" for label, error in failed]
        final = self._place(self._final) if self._final is not None else None
        if not reads:
            change = f"depth reads whose weights cannot be computed again ({notes[0]})"
            if not all(isinstance(error, DrawsNumbers) for _, error in failed):
                raise Untraceable(f"its depth reads cannot be computed from what hooks see: {notes[0]}")
            log.warning("depthscope: %s is mixed by %s.", type(self._tape.root).__name__, change)
            entry = self._seen.place(self._entries[0]) if len(self._entries) == 1 else None
            return Sites(self._tape.root, layers, final, [], change=f"mixed by {change}", entry=entry)
        constant = max(sum(self._mixes.is_constant(s) for s in mix.sources) for mix in self._reads)
        columns = columns_of(
            [[self._members(source) for source in mix.sources] or [(0,)] for mix in self._reads],
            layers,
            constant,
        )
        odd = oddities(
            self._tape,
            self._reads,
            self._final,
            lambda node: self._mixes.terms(node, self._embedding),
            self._members,
            self._handed_on,
        )
        found = FoundReads(
            tuple(reads),
            tuple(rows),
            columns,
            tuple(map(self._seen.place, self._entries)),
            tuple([*odd, *notes]),
            self._seen.tokens_first,
            self._turned,
        )
        return Sites(self._tape.root, layers, final, [], change="mixed by depth reads", found=found)

    # What is what

    def _begins(self, mix: Mix) -> bool:
        """Whether it reads the embedding alone, or its sum with the first layers, as where it is part of a depth block."""
        if mix.sources == [self._embedding]:
            return True
        terms = self._mixes.terms(mix.sources[0], self._embedding)
        return mix.node in self._mixes.found and self._embedding in terms and len(terms) > 1

    def _find_embedding(self, mixes: list[Mix]) -> Node:
        """The oldest source, or what that began with."""
        sources = {
            s for mix in mixes for s in mix.sources if s.value.any() and not self._mixes.is_constant(s)
        }
        oldest = min(sources, key=lambda each: each.index)
        terms = [term for term in self._mixes.terms(oldest) if term.value.any()]
        first = min(terms, key=lambda each: each.index)
        looked_up = [
            each
            for each in self._tape.ancestors(first)
            if self._mixes.is_stream(each)
            and all(name_of(term) == "embedding" for term in self._mixes.terms(each))
        ]
        # Where the embedding is no source, the first is what a layer made of it.
        if looked_up and any(p.ndim > 1 for p in self._parameters(first, {looked_up[-1]}).values()):
            return looked_up[-1]
        return first if any(self._tape.made_from(term, first) for term in terms) else oldest

    def _find_outputs(self) -> list[Node]:
        """What layers add, in order."""
        sums = [source for mix in self._reads for source in mix.sources]
        sums += [self._final] if self._final is not None else []
        terms = {term for each in sums for term in self._mixes.terms(each, self._embedding)}
        reads = {mix.node for mix in self._reads}
        if self._final is not None:
            reads |= {self._mixes.carried(each, self._final) for each in reads}
        found = [
            t
            for t in terms
            if t not in reads
            and t not in self._mixes.gated
            and t is not self._embedding
            and t.value.any()
            and t.func is not None
        ]
        outputs, embeddings = [], [self._embedding]
        for t in sorted(found, key=lambda t: t.index):
            if any(self._tape.made_from(t, each) for each in embeddings):
                outputs.append(t)
            elif any(self._tape.made_from(t, each) for each in self._tape.given):
                embeddings.append(t)  # a decoder's, which its first layers are made of
        return outputs

    def _is_known(self, source: Node) -> bool:
        """Whether it sums what layers make, and is not made of that for one mix alone, as a projection is."""
        return bool(self._stops & {source, *self._mixes.terms(source, self._embedding)})

    def _handed_on(self, node: Node) -> Node:
        """The state that a mix is handed on in: to the first layer that is made of it, or as the final state."""
        towards = next(
            (output for output in self._outputs if self._tape.made_from(output, node)), self._final
        )
        return node if towards is None else self._mixes.carried(node, towards)

    # Layers

    def _layers(self) -> list[LayerSite]:
        made = []
        for index, (output, state) in enumerate(zip(self._outputs, self._states, strict=True), 1):
            everything = self._parameters(output, self._stops - {output})
            beyond = {state} - {None}
            own = self._parameters(output, self._stops - {output} | beyond)
            name = common_name(own) or f"layer {index}"
            kind = kind_by_name(name.rpartition(".")[2]) or self._kind(name, own) or "layer"
            made.append((name, kind, output, state, tuple(everything.values())))
        blocks = blocks_of([(name, kind) for name, kind, *_ in made])
        return [
            LayerSite(
                Layer(index, kind, block, name),
                self._place(state),
                self._place(output),
                None,
                index,
                (),
                parameters,
            )
            for index, (block, (name, kind, output, state, parameters)) in enumerate(
                zip(blocks, made, strict=True), 1
            )
        ]

    def _kind(self, name: str, own: dict[str, nn.Parameter]) -> str | None:
        """What a module called so is; of one that holds more than the layer, what its `own` parameters say."""
        try:
            module = self._tape.root.get_submodule(name)
        except AttributeError:
            return None
        inside = " ".join(key.removeprefix(name).rpartition(".")[0] for key in own)
        whole = set(module.parameters()) <= set(own.values())
        return (whole and kind_by_name(type(module).__name__)) or kind_by_name(name) or kind_by_name(inside)

    def _parameters(self, node: Node, stops: set[Node]) -> dict[str, nn.Parameter]:
        return parameters_between(self._tape, node, stops)

    def _place(self, node: Node | None) -> Place | None:
        """A state is seen best where it is received."""
        if node is None:
            return None
        is_state = node in self._mixes.found or node in self._states
        return self._seen.place(self._seen.received(node) if is_state else self._seen.at(node))

    # Reads

    def _rows(
        self, layers: list[LayerSite]
    ) -> tuple[list[Read], list[FoundRead], list[tuple[str, Unreplayable]]]:
        rows, reads, failed = [], [], []
        for label, kind, layer, mix in self._labelled(layers):
            for head in range(mix.heads):
                which = f", head {head + 1} of {mix.heads}" if mix.heads > 1 else ""
                try:
                    found = self._read(mix, head)
                except Unreplayable as error:
                    failed.append((label + which, error))
                    continue
                rows.append(Read(label + which, kind, layer, max(1, len(mix.edges))))
                reads.append(found)
        return rows, reads, failed

    def _labelled(self, layers: list[LayerSite]) -> Iterator[tuple[str, str, int | None, Mix | None]]:
        """(label, kind, layer, mix) of each read in order; a first layer that receives the embedding has no mix."""
        of_layer: dict[int, list[Mix]] = {}
        rest = []
        for mix in self._reads:
            index = next(
                (i for i, output in enumerate(self._outputs, 1) if self._tape.made_from(output, mix.node)),
                None,
            )
            of_layer.setdefault(index, []).append(mix) if index else rest.append(mix)
        alone = 1 not in of_layer and len(of_layer) == len(layers) - 1
        begins = (
            alone
            and self._states[0]
            and self._mixes.bare(self._states[0]) is self._mixes.bare(self._embedding)
        )
        if begins and self._receives_embedding():
            of_layer[1] = [Mix(self._states[0], {}, [])]
        for site in layers:
            several = of_layer.get(site.layer.index, [])
            for number, mix in enumerate(several, 1):
                which = f", read {number} of {len(several)}" if len(several) > 1 else ""
                yield site.layer.label + which, site.layer.kind, site.layer.index, mix
        for number, mix in enumerate(rest, 1):
            is_final = self._handed_on(mix.node) is self._final or number == len(rest)
            yield ("final read" if is_final else f"read {number} after the layers"), "final", None, mix

    def _receives_embedding(self) -> bool:
        """Whether a norm, or a layer without one in it, is given the embedding, and not something made of it."""
        return any(
            spot.before and (is_norm(spot.module) or not any(map(is_norm, spot.module.modules())))
            for node in (self._embedding, *self._seen.same(self._embedding))
            for spot in self._tape.spots.get(node, ())
            if spot.name
            and any(self._tape.made_from(self._outputs[0], n) for n in self._tape.users.get(node, ()))
        )

    def _read(self, mix: Mix, head: int) -> FoundRead:
        spot = self._seen.received(mix.node)
        if not mix.edges:
            if spot is None:
                raise Unreplayable("no hook sees the embedding")
            # The embedding where it is made, so that what the layer receives is compared with it.
            made = [each for each in self._entries if each.moment <= spot.moment]
            turned = self._turned and bool(made)
            replay = Replay(_of_one_turned if turned else _of_one, tuple(made) or (spot,), (), False)
            moment = self._tape.moments[spot.moment]
            return FoundRead("the embedding as it is", replay, moment, spot, (), is_source=True)
        route, query = self._route(mix), self._query(mix)
        if spot is None and (found := witness_of(self._tape, mix.node)) is not None:
            witness, seen = found
            with suppress(Unreplayable):
                replay = replay_of(self._tape, self._twin, mix, seen.moment, witness, head)
                return FoundRead(route, replay, self._tape.moments[seen.moment], None, query, seen)
        if spot is None:
            route += ", its mix seen nowhere, so that it is not checked"
        when = moment_of(self._tape, mix.node) if spot is None else self._tape.moments[spot.moment]
        replay = replay_of(self._tape, self._twin, mix, when.place, head=head)
        return FoundRead(route, replay, when, spot, query)

    def _query(self, mix: Mix) -> tuple[tuple[nn.Module, str], ...]:
        """The parameters whose product is the query: a vector, and perhaps the gain of the keys. Empty where the
        weights are made otherwise."""
        root = self._tape.root
        if mix.heads > 1:
            return ()
        if mix.law is not None:
            vectors = [mix.node.slots[slot] for slot in mix.law.query]
            names = [name for each in vectors for name in self._parameters(each, self._stops)]
        else:
            names = list(self._parameters(mix.node, self._stops))
        if any(root.get_parameter(name).numel() != self._mixes.width for name in names):
            return ()
        parts = (name.rpartition(".") for name in names)
        return tuple((root.get_submodule(holder), key) for holder, _, key in parts)

    def _route(self, mix: Mix) -> str:
        around = self._around(mix.node)
        names = {getattr(node.func, "__name__", "") for node in mix.steps}
        kernel = " by an attention kernel" if "scaled_dot_product_attention" in names else ""
        if mix.law is not None:
            kernel = ", a kernel that shows nothing but follows the definition"
            kernel += ", with the norm after it" if mix.law.gain is not None else ""
        elif mix.node.opaque:
            kernel = ", a kernel that shows nothing: least squares over its sources"
        values = ", normalised values" if mix.normalised else ""
        made = any(not spot.before and spot.name == around for spot in self._tape.spots.get(mix.node, ()))
        return f"{'read module' if made else 'inline in'} {around or type(self._tape.root).__name__}{kernel}{values}"

    def _around(self, node: Node) -> str:
        """The innermost module within which a node was made."""
        open_calls: list[str] = []
        for moment in self._tape.moments:
            if moment.nodes > node.index:
                break
            open_calls.append(moment.name) if moment.before else open_calls.pop()
        return open_calls[-1] if open_calls else ""

    # Columns

    def _members(self, source: Node) -> tuple[int, ...]:
        """Layers whose outputs a source sums; 0 is the embedding."""
        number = {output: index for index, output in enumerate(self._outputs, 1)} | {self._embedding: 0}
        return tuple(sorted(number[t] for t in self._mixes.terms(source, self._embedding) if t in number))


def _of_one_turned(*parts: torch.Tensor) -> tuple:
    return _of_one(sum(parts).transpose(0, 1))


def _of_one(*parts: torch.Tensor) -> tuple:
    x = sum(parts)
    return torch.ones_like(x[..., 0]).unsqueeze(0), [x], x, x
