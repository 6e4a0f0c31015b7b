"""What authors who have never met mix: blocks that begin and end in their own ways, streams and sources that are gated,
scaled, projected.

As in `foreign_families.py`, the weights of a model's reads, [S, B, T] in the order in which it makes them, are kept in `own`
where that is a list.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.probes.foreign import unit
from tests.probes.foreign_families import WIDTH, Family, rms, weighed


class Detaching(Family):
    """Norms are functions; finished blocks are detached and the running one begins as zeros; nothing is read before the
    first block is finished; an earlier read by the last query is taken off the last."""

    def __init__(self):
        super().__init__(8)
        self.backout = nn.Parameter(torch.tensor(0.2))

    def read(self, blocks, partial, number):
        if not blocks:
            return partial
        values = torch.stack([*blocks, partial], dim=0)
        logits = torch.einsum("d, nbtd -> nbt", self.queries[number], rms(values))
        return weighed(self.kept(F.softmax(logits, dim=0)), values)

    def stream(self, x):
        blocks, partial = [], rms(x)
        for i in range(0, 8, 2):
            state = self.read(blocks, partial, i)
            if i % 4 == 0:
                blocks.append(partial.detach())
                partial = torch.zeros_like(x)
            partial = partial + checkpoint(self.sublayers[i], rms(state), use_reentrant=False)
            state = self.read(blocks, partial, i + 1)
            partial = partial + checkpoint(self.sublayers[i + 1], rms(state), use_reentrant=False)
            if i == 4:
                back = self.read(blocks, partial, -1)
        return self.read(blocks, partial, -1) - self.backout * back


class Committing(Family):
    """The running block begins as zeros and is a source at once; keys are normalised by hand; the head is tied."""

    def __init__(self):
        super().__init__(6)
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(7, WIDTH))
        self.head.weight = self.embedding.weight

    def read(self, blocks, partial, number):
        values = torch.stack([*blocks, partial])
        size = values.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        logits = torch.einsum(
            "d, s b t d -> s b t", self.queries[number], self.gain[number] * (values / size)
        )
        return weighed(self.kept(logits.softmax(dim=0)), values)

    def stream(self, x):
        blocks, partial = [x], torch.zeros_like(x)
        for i, layer in enumerate(self.sublayers):
            partial = partial + layer(self.norms[i](self.read(blocks, partial, i)))
            if i in (1, 3):
                blocks, partial = [*blocks, partial], torch.zeros_like(partial)
        return self.read(blocks, partial, -1)


class FallingBack(Family):
    """A plain residual until the first block is finished, looks for NaN on the way, no final read: the last block is the
    final state."""

    def __init__(self):
        super().__init__(8)

    def read(self, blocks, partial, number):
        if torch.isnan(partial).any() or torch.isinf(partial).any():
            raise ValueError("not finite")
        values = torch.stack([*(block.detach() for block in blocks), partial])
        logits = torch.einsum("d,nbtd->nbt", self.queries[number], unit(values)) / 0.7
        return weighed(self.kept(logits.softmax(dim=0)), values)

    def stream(self, x):
        blocks, partial = [], None
        for i in range(0, 8, 2):
            if partial is None:
                partial = torch.zeros_like(x)
            state = self.read(blocks, partial, i) if blocks else x
            partial = partial + self.sublayers[i](self.norms[i](state))
            state = self.read(blocks, partial, i + 1) if blocks else partial
            partial = partial + self.sublayers[i + 1](self.norms[i + 1](state))
            x = partial
            if i % 4 == 2:
                blocks, partial = [*blocks, partial], None
        return x


class Delta(Family):
    """What is read of earlier outputs is added to the running stream."""

    def added(self, deltas, partial, number):
        if not deltas:
            return partial
        values = torch.stack(deltas)
        return partial + weighed(self.kept((unit(values) @ self.queries[number]).softmax(0)), values)

    def stream(self, x):
        deltas, partial = [], x
        for i, layer in enumerate(self.sublayers):
            output = layer(self.norms[i](self.added(deltas, partial, i)))
            deltas = deltas or [partial]
            partial = partial + output
            deltas = [*deltas, output]
        return self.added(deltas, partial, -1)


class Gated(Family):
    """A learned share of the read, the rest of the running stream."""

    def __init__(self):
        super().__init__()
        self.gates = self.made()

    def made(self):
        return nn.Parameter(torch.randn(5))

    def gate(self, i, partial):
        return torch.sigmoid(self.gates[i])

    def stream(self, x):
        sources, partial = [x], x
        for i, layer in enumerate(self.sublayers):
            gate = self.gate(i, partial)
            output = layer(self.norms[i]((1 - gate) * partial + gate * self.mix(sources, i)))
            partial = partial + output
            sources.append(output)
        return self.mix(sources, -1)


class GatedByState(Gated):
    """The share is made of the running stream, token by token."""

    channels = 1

    def made(self):
        return nn.ModuleList(nn.Linear(WIDTH, self.channels) for _ in range(4))

    def gate(self, i, partial):
        return torch.sigmoid(self.gates[i](partial))


class GatedByChannel(GatedByState):
    channels = WIDTH


class ScaledStream(Family):
    """The running block is scaled and has a share of the embedding added before each read."""

    def __init__(self):
        super().__init__(6)
        self.keep, self.first = (nn.Parameter(torch.rand(6) + 0.5) for _ in range(2))

    def stream(self, x):
        blocks, partial = [x], None
        for i, layer in enumerate(self.sublayers):
            if partial is not None:
                partial = self.keep[i] * partial + self.first[i] * x
            state = self.mix([*blocks, *([] if partial is None else [partial])], i)
            output = layer(self.norms[i](state))
            partial = output if partial is None else partial + output
            if i % 2:
                blocks.append(partial)
                partial = None
        return self.mix(blocks, -1)


class ScaledSources(Family):
    """A learned scale for each output before it joins the list."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(1) + 0.5) for _ in range(5))

    def stream(self, x):
        sources = [x * self.scales[0]]
        for i, layer in enumerate(self.sublayers):
            sources.append(self.scales[i + 1] * layer(self.norms[i](self.mix(sources, i))))
        return self.mix(sources, -1)


class ScaledStack(Family):
    """A learned scale for each source in each read, on the stack."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.rand(5, 5) + 0.5)

    def mix(self, sources, read):
        values = torch.stack(sources) * self.scales[read, : len(sources), None, None, None]
        weight = self.kept((unit(values) @ self.queries[read]).softmax(0))
        return (weight[..., None] * values).sum(0)


class Projected(Family):
    """Keys and values are projections of the sources; queries are rows of an embedding."""

    def __init__(self):
        super().__init__()
        self.k, self.v = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)) for _ in range(2)
        )
        self.q = nn.Embedding(5, WIDTH)

    def mix(self, sources, read):
        stack = torch.stack(sources, 2)
        logits = torch.einsum("btsd,d->bts", self.k[read](rms(stack)), self.q(torch.tensor(read % 5)))
        weight = torch.softmax(3 * logits, -1)
        self.kept(weight.movedim(-1, 0))
        return torch.einsum("bts,btsd->btd", weight, self.v[read](stack))


class ProjectedOneByOne(Projected):
    def mix(self, sources, read):
        values = [self.v[read](source) for source in sources]
        logits = [(self.k[read](rms(source)) * 3 * self.q.weight[read]).sum(-1) for source in sources]
        weight = self.kept(torch.stack(logits).softmax(0))
        return sum(w.unsqueeze(-1) * value for w, value in zip(weight, values, strict=True))


class NormedOneByOne(Family):
    """Values normalised one by one, weights by sigmoid."""

    def mix(self, sources, read):
        values = [unit(source) for source in sources]
        weight = [torch.sigmoid(value @ self.queries[read]) for value in values]
        self.kept(torch.stack(weight))
        return sum(w.unsqueeze(-1) * value for w, value in zip(weight, values, strict=True))


SOURCES = {
    name: each
    for name, each in list(globals().items())
    if isinstance(each, type) and each.__module__ == __name__
}
