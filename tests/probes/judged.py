"""Foreign models that tell what is theirs: weights of each read, states, outputs, and the gradients of both."""

# ruff: noqa: RUF005 - lists are added up on purpose: nobody may take that for a residual

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, WORDS = 16, 24


class Told:
    """What a model says while somebody listens; nothing otherwise."""

    def __init__(self):
        self.listening = False
        self.begin()

    def begin(self) -> None:
        self.weights: list[Tensor] = []
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def weight(self, w: Tensor) -> Tensor:
        """[S, ...] of one read"""
        if self.listening:
            self.weights.append(w.detach().flatten(1))
        return w

    def state(self, x: Tensor) -> Tensor:
        return self._kept(x, self.states)

    def output(self, x: Tensor) -> Tensor:
        return self._kept(x, self.outputs)

    def _kept(self, x: Tensor, where: list[Tensor]) -> Tensor:
        if self.listening:
            x.retain_grad()
            where.append(x)
        return x


told = Told()
weight, state, output = told.weight, told.state, told.output


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Read(nn.Module):
    """A softmax read of a list."""

    def __init__(self):
        super().__init__()
        self.query, self.norm = nn.Parameter(torch.randn(WIDTH)), nn.RMSNorm(WIDTH)

    def weights(self, values):
        return (self.norm(values) @ self.query).softmax(0)

    def forward(self, sources):
        values = torch.stack(sources)
        return torch.einsum("sbt,sbtd->btd", weight(self.weights(values)), values)


class Block(nn.Module):
    """Two layers, each behind a read of all before."""

    def __init__(self, read):
        super().__init__()
        self.read1, self.norm1, self.attn = read(), nn.LayerNorm(WIDTH), Attention()
        self.read2, self.norm2, self.mlp = read(), nn.LayerNorm(WIDTH), MLP()

    def forward(self, sources):
        sources = sources + [output(self.attn(self.norm1(state(self.read1(sources)))))]
        return sources + [output(self.mlp(self.norm2(state(self.read2(sources)))))]


class Model(nn.Module):
    """Blocks that hand a list on, and a final read."""

    def __init__(self, read=Read, block=Block, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(block(read) for _ in range(blocks))
        self.last, self.norm, self.head = read(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def end(self, sources):
        return self.norm(state(self.last(sources)))

    def forward(self, idx, targets):
        sources = [output(self.embedding(idx))]
        for block in self.blocks:
            sources = block(sources)
        logits = self.head(self.end(sources))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Reads


class OfNoVector(nn.Module):
    """Its query is a matrix of one column, no vector as wide as the stream, and it is applied by bmm in float32."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, WIDTH, 1))

    def forward(self, sources):
        with torch.autocast("cpu", enabled=False):
            values = torch.stack(sources, 2).flatten(0, 1).float()
            logits = torch.bmm(F.rms_norm(values, (WIDTH,)), self.query.expand(len(values), -1, -1))
            weights = logits.softmax(1)
            weight(weights[..., 0].T)
            return torch.bmm(weights.mT, values).view(sources[0].shape)


class FromTheNewest(nn.Module):
    """Query and keys are projections: no parameter is a vector."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, sources):
        values = torch.stack(sources)
        logits = torch.einsum("btd,sbtd->sbt", self.query(sources[-1]), self.key(values))
        return torch.einsum("sbt,sbtd->btd", weight(logits.softmax(0)), values)


class Online(Read):
    """Each source is blended in with what its score is worth beside the scores so far."""

    def forward(self, sources):
        scores = [self.norm(source) @ self.query for source in sources]
        weight(torch.stack(scores).softmax(0))
        mix, total = sources[0], scores[0]
        for source, score in zip(sources[1:], scores[1:], strict=True):
            mix = torch.lerp(mix, source, torch.sigmoid(score - total).unsqueeze(-1))
            total = torch.logaddexp(total, score)
        return mix


class ByKernel(Read):
    """By an attention kernel, one source like several."""

    def forward(self, sources):
        values = torch.stack(sources, 2)
        keys = self.norm(values)
        weight((keys @ self.query * WIDTH**-0.5).softmax(2).movedim(2, 0))
        query = self.query.expand(*values.shape[:2], 1, WIDTH)
        return F.scaled_dot_product_attention(query, keys, values).squeeze(2)


class Scaled(Read):
    """The mix times the root of the number of sources."""

    def forward(self, sources):
        return super().forward(sources) * len(sources) ** 0.5


class Static(nn.Module):
    """A linear layer over the sources, on the last axis."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(1, 8))

    def forward(self, sources):
        values = torch.stack(sources, -1)
        weights = self.logits[:, : len(sources)].softmax(-1)
        weight(weights[0].view(-1, 1, 1).expand(-1, *values.shape[:2]))
        return F.linear(values, weights).squeeze(-1)


# Blocks


class Hybrid(Block):
    """One read for the block, and a plain residual inside."""

    def forward(self, sources):
        mix = state(self.read1(sources))
        mix = mix + output(self.attn(self.norm1(mix)))
        return sources + [mix + output(self.mlp(self.norm2(state(mix))))]


class Gained(Block):
    """Both layers have their gain in a parameter of the block."""

    def __init__(self, read):
        super().__init__(read)
        self.gains = nn.Parameter(1 + 0.1 * torch.randn(2, WIDTH))

    def forward(self, sources):
        first = self.attn(self.norm1(state(self.read1(sources)))) * self.gains[0]
        sources = sources + [output(first)]
        return sources + [output(self.mlp(self.norm2(state(self.read2(sources)))) * self.gains[1])]


class Padded(Block):
    """A causal convolution, whose padding is cut off."""

    def __init__(self, read):
        super().__init__(read)
        self.attn = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def forward(self, sources):
        x = self.norm1(state(self.read1(sources)))
        sources = sources + [output(self.attn(x.mT)[..., : x.shape[1]].mT.contiguous())]
        return sources + [output(self.mlp(self.norm2(state(self.read2(sources)))))]


class Dropped(Block):
    """Stochastic depth: half of the samples go without the layer."""

    def forward(self, sources):
        sources = sources + [output(self.dropped(self.attn(self.norm1(state(self.read1(sources))))))]
        return sources + [output(self.dropped(self.mlp(self.norm2(state(self.read2(sources))))))]

    @staticmethod
    def dropped(x):
        return x * torch.empty(len(x), 1, 1).bernoulli_(0.5) * 2


# Ends


class LastAndHead(Model):
    """No final read and no final norm."""

    def end(self, sources):
        return state(sources[-1])


class SumAndHead(Model):
    def end(self, sources):
        return state(sum(sources))


class Transformed(Model):
    """The head is one of masked language models, behind the last layer."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def end(self, sources):
        return self.norm(F.gelu(self.dense(state(sources[-1]))))


class NormedTwice(Model):
    """The mix is normalised by a function before the final norm."""

    def end(self, sources):
        return self.norm(F.rms_norm(state(self.last(sources)), (WIDTH,)))


JUDGED = {
    "query of no vector": lambda: Model(OfNoVector),
    "query and keys projected": lambda: Model(FromTheNewest),
    "online by lerp": lambda: Model(Online),
    "kernel": lambda: Model(ByKernel),
    "scaled mix": lambda: Model(Scaled),
    "linear over sources": lambda: Model(Static),
    "plain residual inside": lambda: Model(block=Hybrid, blocks=3),
    "gains in the block": lambda: Model(block=Gained),
    "padded convolution": lambda: Model(block=Padded),
    "stochastic depth": lambda: Model(block=Dropped),
    "last layer and head": LastAndHead,
    "sum and head": SumAndHead,
    "last layer and a head of two": Transformed,
    "normalised twice": NormedTwice,
}
