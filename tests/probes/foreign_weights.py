"""How authors who have never met weigh: where the weights come from, how they are laid out, and what sums.

As in `foreign_families.py`, the weights of a model's reads, [S, B, T] in the order in which it makes them, are kept in `own`
where that is a list.
"""

import collections

import torch
from torch import nn
from torch.nn import functional as F

from tests.probes.foreign import unit
from tests.probes.foreign_families import WIDTH, Family, rms, weighed


class Named(Family):
    """Sources in a dict, logits by a linear layer that is called, log-sum-exp by hand."""

    def __init__(self):
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(5))
        for proj in self.proj:
            nn.init.normal_(proj.weight)
        self.key_norm = nn.RMSNorm(WIDTH)

    def mix(self, sources, read):
        logits = {name: self.proj[read](self.key_norm(source)) for name, source in sources.items()}
        every = torch.cat(list(logits.values()), -1)
        total = torch.logsumexp(every, -1, keepdim=True)
        self.kept((every - total).exp().movedim(-1, 0))
        state = 0
        for name, source in sources.items():
            state = state + (logits[name] - total).exp() * source
        return state

    def stream(self, x):
        sources = {"embedding": x}
        for i, layer in enumerate(self.sublayers):
            sources[f"layer {i}"] = layer(self.norms[i](self.mix(sources, i)))
        return self.mix(sources, -1)


class Windowed(Family):
    """The newest three in a deque, exponentials and sums by hand, a learned temperature, letters in another order."""

    def __init__(self):
        super().__init__()
        self.heat = nn.Parameter(torch.tensor(0.3))

    def mix(self, sources, read):
        values = torch.stack(tuple(sources), dim=-2)
        keys = F.layer_norm(values, (WIDTH,))
        logits = torch.einsum("zyxw,w->zyx", keys, self.queries[read]) * WIDTH**-0.5 * 3 * self.heat.exp()
        weight = torch.exp(logits - logits.max(-1, keepdim=True).values)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-9)
        self.kept(weight.movedim(-1, 0))
        return torch.einsum("zyx,zyxw->zyw", weight, values)

    def stream(self, x):
        sources = collections.deque([x], maxlen=3)
        for i, layer in enumerate(self.sublayers):
            sources.append(layer(self.norms[i](self.mix(sources, i))))
        return self.mix(sources, -1)


class Preallocated(Family):
    """One store for the whole forward, read by slices."""

    def stream(self, x):
        store = x.new_zeros(*x.shape[:2], 5, WIDTH).index_fill(2, torch.tensor([0]), 0)
        store[:, :, 0] = x
        for i in range(5):
            values = store[:, :, : i + 1].clone()
            weight = (F.rms_norm(values, (WIDTH,)) @ self.queries[i]).softmax(-1)
            self.kept(weight.movedim(-1, 0))
            state = torch.matmul(weight.unsqueeze(-2), values).squeeze(-2)
            if i < 4:
                store = store.clone()
                store[:, :, i + 1] = self.sublayers[i](self.norms[i](state))
        return state


class TwoPhases(Family):
    """The paper's two phases: the queries of a block against the finished ones at once, then the running sum online."""

    def __init__(self):
        super().__init__(6)

    def stream(self, x):
        blocks = [x]
        for first in (0, 2, 4):
            values, queries = torch.stack(blocks), self.queries[first : first + 2]
            logits = torch.einsum("qd,nbtd->qnbt", queries, rms(values))
            most = logits.amax(1)
            parts = (logits - most[:, None]).exp()
            total, done = parts.sum(1), torch.einsum("qnbt,nbtd->qbtd", parts, values)
            partial = None
            for j in (0, 1):
                if partial is None:
                    state = done[j] / total[j][..., None]
                    self.kept(parts[j] / total[j])
                else:
                    logit = rms(partial) @ queries[j]
                    new = torch.maximum(most[j], logit)
                    old, fresh = (most[j] - new).exp(), (logit - new).exp()
                    sum_ = total[j] * old + fresh
                    state = (done[j] * old[..., None] + partial * fresh[..., None]) / sum_[..., None]
                    self.kept(torch.cat([parts[j] * old / sum_, (fresh / sum_)[None]]))
                output = self.sublayers[first + j](self.norms[first + j](state))
                partial = output if partial is None else partial + output
            blocks.append(partial)
        return self.mix(blocks, -1)


class Merged(Family):
    """Two softmaxes, merged by their log-sum-exp."""

    def mix(self, sources, read):
        if len(sources) < 3:
            return super().mix(sources, read)
        found = []
        for part in (sources[:2], sources[2:]):
            values = torch.stack(part)
            logits = unit(values) @ self.queries[read]
            found.append((weighed(logits.softmax(0), values), logits.logsumexp(0), logits.softmax(0)))
        share = torch.stack([total for _, total, _ in found]).softmax(0)
        self.kept(torch.cat([weight * part for (_, _, weight), part in zip(found, share, strict=True)]))
        return share[0][..., None] * found[0][0] + share[1][..., None] * found[1][0]


class Gathered(Family):
    """The two best sources, gathered."""

    def mix(self, sources, read):
        values = torch.stack(sources, 2)
        logits = unit(values) @ self.queries[read]
        best, where = logits.topk(min(2, len(sources)), -1)
        weight = best.softmax(-1)
        self.kept(torch.zeros_like(logits).scatter(-1, where, weight).movedim(-1, 0))
        picked = values.gather(2, where.unsqueeze(-1).expand(*where.shape, WIDTH))
        return (weight.unsqueeze(-1) * picked).sum(2)


class WithNull(Family):
    """A learned vector is a source of its own."""

    def __init__(self):
        super().__init__()
        self.null = nn.Parameter(torch.randn(WIDTH))

    def mix(self, sources, read):
        return super().mix([self.null.expand_as(sources[0]), *sources], read)


class WithSink(Family):
    """A one in the denominator: weights that sum to less."""

    def mix(self, sources, read):
        values = torch.stack(sources)
        parts = (unit(values) @ self.queries[read]).exp()
        return weighed(self.kept(parts / (1 + parts.sum(0))), values)


class Static(Family):
    """Learned weights, the same for every token, one parameter for each."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.rand(1)) for _ in range(i + 1)) for i in range(5)
        )

    def mix(self, sources, read):
        weights = self.weights[read]
        self.kept(torch.stack([weight.expand(sources[0].shape[:2]) for weight in weights]))
        return sum(weight * source for weight, source in zip(weights, sources, strict=True))


class Dynamic(Family):
    """Queries made of the sum of all sources."""

    def __init__(self):
        super().__init__()
        self.to_query = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def mix(self, sources, read):
        values = torch.stack(sources)
        query = self.to_query[read](F.silu(values.sum(0)))
        return weighed(self.kept(torch.einsum("btd,sbtd->sbt", query, rms(values)).div(2).softmax(0)), values)


class TwoSummed(Family):
    """Two reads with queries of their own, summed."""

    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.randn(5, WIDTH))

    def mix(self, sources, read):
        values = torch.stack(sources)
        keys = unit(values)
        one, two = (self.kept((keys @ q[read]).softmax(0)) for q in (self.queries, self.second))
        return weighed(one, values) + weighed(two, values)


class QueriesAtOnce(Family):
    """Three queries in one product, for queries, keys and values of attention."""

    def __init__(self):
        super().__init__()
        self.three = nn.Parameter(torch.randn(4, 3, WIDTH))
        self.into = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(16))

    def layer(self, index, sources):
        values = torch.stack(sources)
        weight = torch.einsum("qd,nbtd->qnbt", self.three[index], unit(values)).softmax(1)
        for each in weight:
            self.kept(each)
        mixes = torch.einsum("qnbt,nbtd->qbtd", weight, values)
        parts = [self.into[4 * index + j](self.norms[index](mix)) for j, mix in enumerate(mixes)]
        return self.into[4 * index + 3](F.scaled_dot_product_attention(*parts, is_causal=True))


class Heads(Family):
    """Four heads, each weighing channels of its own."""

    def mix(self, sources, read):
        values = torch.stack(sources)
        keys = unit(values).unflatten(-1, (4, -1))
        weight = torch.einsum("hk,nbthk->nbth", 2 * self.queries[read].view(4, -1), keys).softmax(0)
        for each in weight.unbind(-1):
            self.kept(each)
        return torch.einsum("nbth,nbthk->bthk", weight, values.unflatten(-1, (4, -1))).flatten(-2)


class HeadsInAKernel(Family):
    """Three heads in an attention kernel over depth."""

    def mix(self, sources, read):
        values = torch.stack(sources, 2)
        B, T, S, D = values.shape
        keys, split = (x.view(B * T, S, 3, D // 3).transpose(1, 2) for x in (unit(values), values))
        query = self.queries[read].view(1, 3, 1, D // 3).expand(B * T, 3, 1, D // 3)
        weight = (query @ keys.mT / (D // 3) ** 0.5).softmax(-1)
        for each in weight.view(B, T, 3, S).unbind(2):
            self.kept(each.movedim(-1, 0))
        return F.scaled_dot_product_attention(query, keys, split).transpose(1, 2).reshape(B, T, D)


class Packed(Family):
    """All tokens on one axis, the query as the weight of a linear map, keys kept beside their sources."""

    def stream(self, x):
        B, T, D = x.shape
        sources, keys = [x.reshape(-1, D)], [unit(x).reshape(-1, D)]
        for i in range(5):
            weight = F.linear(torch.stack(keys, 1), self.queries[i][None]).squeeze(-1).softmax(1)
            self.kept(weight.view(B, T, -1).movedim(-1, 0))
            state = torch.bmm(weight.unsqueeze(1), torch.stack(sources, 1)).view(B, T, D)
            if i < 4:
                sources.append(self.sublayers[i](self.norms[i](state)).reshape(-1, D))
                keys.append(unit(sources[-1]))
        return state


class ChannelsFirst(Family):
    """Channels before tokens while it reads."""

    def mix(self, sources, read):
        values = torch.stack([source.transpose(1, 2) for source in sources])
        keys = values / (values.pow(2).mean(2, keepdim=True) + 1e-6).sqrt()
        weight = self.kept(torch.einsum("sbdt,d->sbt", keys, self.queries[read]).softmax(0))
        return torch.einsum("sbt,sbdt->btd", weight, values)


WEIGHTS = {
    name: each
    for name, each in list(globals().items())
    if isinstance(each, type) and each.__module__ == __name__
}
