"""AttnRes models of other builds than `foreign.py`'s: what a layer is, what is mixed and who asks for it differ.

Each keeps the weights of its reads, [S, B, T] in order, in `own` where that is a list.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.probes.foreign import MLP, Attention, unit

WIDTH = 24


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def weighed(weight: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("nbt,nbtd->btd", weight, values)


class Family(nn.Module):
    """Two pairs of attention and MLP, full AttnRes with a row of `queries` for each read."""

    def __init__(self, layers: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.final_norm = nn.Embedding(19, WIDTH), nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 19, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.sublayers = nn.ModuleList(self.sublayer(i) for i in range(layers))
        self.queries = nn.Parameter(torch.randn(layers + 1, WIDTH))
        self.own: list[Tensor] | None = None

    def sublayer(self, index: int) -> nn.Module:
        return MLP(WIDTH) if index % 2 else Attention(WIDTH)

    def kept(self, weight: Tensor) -> Tensor:
        if self.own is not None:
            self.own.append(weight.detach())
        return weight

    def mix(self, sources: list[Tensor], read: int) -> Tensor:
        values = torch.stack(sources)
        weight = self.kept((unit(values) @ self.queries[read]).softmax(0))
        return torch.einsum("sbt,sbtd->btd", weight, values)

    def layer(self, index: int, sources: list[Tensor]) -> Tensor:
        return self.sublayers[index](self.norms[index](self.mix(sources, index)))

    def stream(self, x: Tensor) -> Tensor:
        sources = [x]
        for index in range(len(self.sublayers)):
            sources.append(self.layer(index, sources))
        return self.mix(sources, -1)

    def forward(self, idx: Tensor, targets: Tensor):
        logits = self.head(self.final_norm(self.stream(self.embedding(idx))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PaperBlock(nn.Module):
    """A transformer block that is handed finished blocks and the running sum, and commits after its first read."""

    def __init__(self, family: "Paper", index: int):
        super().__init__()
        self.index = index
        self.attn, self.mlp = Attention(WIDTH), MLP(WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))
        self.projs = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(2))
        for proj in self.projs:
            nn.init.normal_(proj.weight)
        self.kept = [family]

    def read(self, number: int, sources: list[Tensor]) -> Tensor:
        values = torch.stack(sources)
        keys = self.norms[2 + number](values)
        logits = torch.einsum("d, n b t d -> n b t", self.projs[number].weight.squeeze(), keys)
        return torch.einsum("n b t, n b t d -> b t d", self.kept[0].kept(logits.softmax(0)), values)

    def forward(self, done: list[Tensor], partial: Tensor) -> tuple[list[Tensor], Tensor]:
        state = self.read(0, [*done, partial])
        if self.index % 2 == 0:
            done, partial = [*done, partial], None
        output = self.attn(self.norms[0](state))
        partial = output if partial is None else partial + output
        return done, partial + self.mlp(self.norms[1](self.read(1, [*done, partial])))


class Paper(Family):
    """Block AttnRes as the paper writes it down, every two transformer blocks a depth block."""

    def __init__(self):
        super().__init__(0)
        self.blocks = nn.ModuleList(PaperBlock(self, index) for index in range(4))

    def stream(self, x):
        done, partial = [], x
        for block in self.blocks:
            done, partial = block(done, partial)
        return self.mix([*done, partial], -1)


class ReadAfter(Family):
    """The state of the next layer is read when a layer is done; the first receives the embedding as it is."""

    def stream(self, x):
        sources, state = [x], x
        for index, layer in enumerate(self.sublayers):
            sources.append(layer(self.norms[index](state)))
            state = self.mix(sources, index + 1)
        return state


class PerBlock(Family):
    """One read for a transformer block, a plain residual within; the block's state is the source."""

    def stream(self, x):
        sources = [x]
        for index in range(0, len(self.sublayers), 2):
            state = self.mix(sources, index)
            for each in (index, index + 1):
                state = state + self.sublayers[each](self.norms[each](state))
            sources.append(state)
        return self.mix(sources, -1)


class Apart(Family):
    """Queries, keys and values of attention read separately."""

    def __init__(self):
        super().__init__()
        self.three = nn.Parameter(torch.randn(4, 3, WIDTH))
        self.into = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def layer(self, index, sources):
        if index % 2:
            return super().layer(index, sources)
        values = torch.stack(sources)
        parts = []
        for number in range(3):
            weight = self.kept((unit(values) @ self.three[index, number]).softmax(0))
            mixed = (weight.unsqueeze(-1) * values).sum(0)
            parts.append(self.into[2 * index + number](self.norms[index](mixed)))
        return self.into[2 * index + 3](F.scaled_dot_product_attention(*parts, is_causal=True))


class FromInput(Family):
    """The query is made from the newest source."""

    def __init__(self):
        super().__init__()
        self.to_query = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def mix(self, sources, read):
        values = torch.stack(sources, 2)
        query = self.to_query[read](sources[-1]).unsqueeze(2)
        weight = (3 * query * unit(values)).sum(-1).softmax(-1)
        self.kept(weight.movedim(-1, 0))
        return (weight.unsqueeze(-1) * values).sum(2)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3, bias=False), nn.ModuleList(MLP(WIDTH) for _ in range(3))

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        return sum(share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Experts(Family):
    """A mixture of experts, itself a weighted sum, is one source."""

    def sublayer(self, index):
        return Expert() if index % 2 else Attention(WIDTH)


class Checkpointed(Family):
    """Reads and layers within activation checkpointing, one dropout for all outputs."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def layer(self, index, sources):
        def run(*sources):
            return self.dropout(Family.layer(self, index, list(sources)))

        return checkpoint(run, *sources, use_reentrant=False)


class Biased(Family):
    """Flat tokens, a recency bias and a temperature, in one batched product."""

    def mix(self, sources, read):
        values = torch.stack(sources, -2)
        B, T, S, D = values.shape
        flat = values.view(B * T, S, D)
        logits = F.layer_norm(flat, (D,)) @ self.queries[read] / D**0.5
        logits = logits + 2 * (torch.arange(S) == S - 1)
        weight = (
            self.kept(logits.softmax(-1).view(B, T, S).movedim(-1, 0)).movedim(0, -1).reshape(B * T, 1, S)
        )
        return torch.bmm(weight, flat).view(B, T, D)


FAMILIES = {
    each.__name__: each for each in (Family, Paper, PerBlock, Apart, FromInput, Experts, Checkpointed, Biased)
}
