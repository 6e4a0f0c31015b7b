"""AttnRes as others write it: one small language model in many dialects, none of them adapted to the probes.

`layout` is how sources are kept and handed to the mix, `normaliser` what makes weights of logits. Each model keeps what
it mixed with (`weights`, [S, B, T] in the order of its sources, by read) only while `asked`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = (
    "stacked first",
    "stacked third",
    "stacked last",
    "flat tokens",
    "list",
    "list of keywords",
    "committed and partial",
    "inline",
    "inline proj",
    "key norm module",
    "normalised values",
    "normed by function",
    "attention kernel",
    "weighted one by one",
    "online softmax",
    "buffer",
)
NORMALISERS = ("softmax", "scaled", "sigmoid", "entmax", "sparsemax", "top-k", "bfloat16")


def normalised(logits: Tensor, kind: str, width: int, dim: int = 0) -> Tensor:
    if kind == "scaled":
        return (logits * width**-0.5).softmax(dim)
    if kind == "sigmoid":
        return torch.sigmoid(logits)
    if kind == "entmax":  # 1.5-entmax by bisection on the threshold
        half = (logits - logits.amax(dim, keepdim=True)) / 2
        low, high = half.amax(dim, keepdim=True) - 1, half.amax(dim, keepdim=True)
        for _ in range(30):
            middle = (low + high) / 2
            above = ((half - middle).clamp_min(0) ** 2).sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        weights = (half - low).clamp_min(0) ** 2
        return weights / weights.sum(dim, keepdim=True)
    if kind == "sparsemax":
        ordered = logits.sort(dim, descending=True).values
        sums = ordered.cumsum(dim)
        shape = [1] * logits.ndim
        shape[dim] = -1
        rank = torch.arange(1, logits.shape[dim] + 1, device=logits.device).view(shape)
        count = (1 + rank * ordered > sums).sum(dim, keepdim=True)
        threshold = (sums.gather(dim, count - 1) - 1) / count
        return (logits - threshold).clamp_min(0)
    if kind == "top-k":
        kept = min(2, logits.shape[dim])
        least = logits.topk(kept, dim).values.amin(dim, keepdim=True)
        return logits.masked_fill(logits < least, -math.inf).softmax(dim)
    if kind == "bfloat16":
        return logits.float().softmax(dim).to(logits.dtype)
    return logits.softmax(dim)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Mixer(nn.Module):
    """One read: how its sources come and how they are mixed is its `layout`."""

    def __init__(self, width: int, layout: str, normaliser: str):
        super().__init__()
        self.layout, self.normaliser, self.width = layout, normaliser, width
        if layout == "inline proj":
            self.proj = nn.Linear(width, 1, bias=False)
        else:
            self.query = nn.Parameter(torch.randn(width))
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.norm = nn.RMSNorm(width)
        self.asked, self.weight = False, None

    def keys(self, values: Tensor) -> Tensor:
        if self.layout in ("key norm module", "inline proj"):
            return self.norm(values)
        if self.layout == "normed by function":
            return F.rms_norm(values, (self.width,), self.gain)
        return unit(values) * self.gain

    def logits(self, keys: Tensor) -> Tensor:
        """[..., D] -> [...]"""
        if self.layout == "inline proj":
            return (
                self.proj.weight.squeeze() @ keys.movedim(-1, -2)
                if keys.ndim < 2
                else keys @ self.proj.weight[0]
            )
        return keys @ self.query

    def kept(self, weight: Tensor) -> Tensor:
        """`weight` [S, B, T]"""
        if self.asked:
            self.weight = weight.detach()
        return weight

    def forward(self, *args, **kwargs) -> Tensor:
        return self.mix(*args, **kwargs)

    def mix(self, sources: list[Tensor]) -> Tensor:
        B, T, D = sources[0].shape
        if self.layout == "stacked third":
            values = torch.stack(sources, dim=2)  # [B, T, S, D]
            weight = normalised(self.logits(self.keys(values)), self.normaliser, D, dim=2)
            self.kept(weight.movedim(2, 0))
            return torch.einsum("bts,btsd->btd", weight, values)
        if self.layout == "stacked last":
            values = torch.stack(sources, dim=-1)  # [B, T, D, S]
            weight = normalised(self.logits(self.keys(values.mT)), self.normaliser, D, dim=2)
            self.kept(weight.movedim(2, 0))
            return (values @ weight.unsqueeze(-1)).squeeze(-1)
        if self.layout == "flat tokens":
            values = torch.stack([source.reshape(B * T, D) for source in sources])  # [S, B·T, D]
            weight = normalised(self.logits(self.keys(values)), self.normaliser, D)
            self.kept(weight.view(-1, B, T))
            return (weight.unsqueeze(-1) * values).sum(0).view(B, T, D)
        if self.layout == "attention kernel":
            values = torch.stack(sources, dim=2).reshape(B * T, 1, len(sources), D)
            keys = self.keys(values)
            query = self.query.expand(B * T, 1, 1, D)
            self.kept((keys @ self.query).softmax(-1).view(B, T, -1).movedim(-1, 0))
            return F.scaled_dot_product_attention(query, keys, values, scale=1.0).view(B, T, D)
        if self.layout == "weighted one by one":
            logits = torch.stack([self.logits(self.keys(source)) for source in sources])
            weight = self.kept(normalised(logits, self.normaliser, D))
            return sum(w.unsqueeze(-1) * source for w, source in zip(weight.unbind(0), sources, strict=True))
        if self.layout == "online softmax":
            return self._online(sources)
        if self.layout == "buffer":
            values = sources[0].new_empty(len(sources), B, T, D)
            for place, source in enumerate(sources):
                values[place] = source
        else:
            values = torch.stack(sources)
        keys = self.keys(values)
        weight = self.kept(normalised(self.logits(keys), self.normaliser, D))
        if self.layout == "normalised values":
            values = keys
        return torch.einsum("sbt,sbtd->btd", weight, values)

    def _online(self, sources: list[Tensor]) -> Tensor:
        logits = [self.logits(self.keys(source)).unsqueeze(-1) for source in sources]
        self.kept(torch.stack(logits).softmax(0).squeeze(-1))
        most, total, mixed = logits[0], torch.ones_like(logits[0]), sources[0]
        for logit, source in zip(logits[1:], sources[1:], strict=True):
            new = torch.maximum(most, logit)
            old, fresh = (most - new).exp(), (logit - new).exp()
            most, total, mixed = new, total * old + fresh, mixed * old + source * fresh
        return mixed / total


class Committed(Mixer):
    """A read that is given a stack of finished blocks and the running one apart."""

    def forward(self, committed: Tensor | None, partial: Tensor | None = None) -> Tensor:
        values = partial[None] if committed is None else committed
        if committed is not None and partial is not None:
            values = torch.cat([committed, partial[None]])
        return self.mix(list(values.unbind(0)))


class ByName(Mixer):
    def forward(self, *, sources: list[Tensor], detail: bool = False) -> Tensor:
        return self.mix(sources)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, 2, D // 2).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attn, self.mlp = Attention(width), MLP(width)


class Foreign(nn.Module):
    """`size` layers make a depth block, None: Full AttnRes. `quirks` are what is seen in real code."""

    def __init__(
        self,
        layout: str = "stacked first",
        normaliser: str = "softmax",
        size: int | None = None,
        blocks: int = 2,
        width: int = 24,
        quirks: tuple[str, ...] = (),
    ):
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.size, self.quirks = layout, size, quirks
        self.wte, self.wpe = nn.Embedding(19, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        kind = {"committed and partial": Committed, "list of keywords": ByName}.get(layout, Mixer)
        self.reads = nn.ModuleList(kind(width, layout, normaliser) for _ in range(2 * blocks + 1))
        self.ln_f, self.head = nn.RMSNorm(width), nn.Linear(width, 19, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None):
        _, T = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        done, partial = [x], None
        if "embedding twice" in self.quirks:
            partial = x
        if "zero partial" in self.quirks:
            partial = torch.zeros_like(x)
        number = 0
        for block in self.blocks:
            for norm, layer in zip(block.norms, (block.attn, block.mlp), strict=True):
                state = self.read(number, done, partial)
                if "layers twice" in self.quirks:
                    layer(norm(state))
                output = layer(norm(state))
                number += 1
                if self.size is None:
                    done.append(output.detach() if "detached" in self.quirks and number == 2 else output)
                    continue
                partial = output if partial is None else partial + output
                if number % self.size == 0:
                    done.append(partial)
                    partial = partial if "never reset" in self.quirks else None
        if "no final mix" in self.quirks:
            state = sum(done) if self.size is None else sum(done) + (0 if partial is None else partial)
        else:
            state = self.read(number, done, partial)
        if "list emptied" in self.quirks:
            done.clear()
        logits = self.head(self.ln_f(state))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def read(self, number: int, done: list[Tensor], partial: Tensor | None) -> Tensor:
        if "no first read" in self.quirks and not number:
            return done[0]
        read = self.reads[number]
        if self.layout == "committed and partial":
            return read(torch.stack(done), partial)
        sources = [*done, *([] if partial is None else [partial])]
        if self.layout == "list of keywords":
            return read(sources=sources, detail=False)
        if self.layout.startswith("inline"):
            return read.mix(sources)
        return read(sources)
