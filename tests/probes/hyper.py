"""Models with hyper-connections, static and by the token."""

from torch import Tensor, nn

from tests.probes.recovering import WORDS


class Connection(nn.Module):
    """How a layer reads from n streams and writes to them, by the token: pre, post [B, T, n] and comb [B, T, n, n]."""

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.streams = streams
        self.mix = nn.Linear(streams * width, (2 + streams) * streams)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.streams
        pre, post, comb = self.mix(x.flatten(2)).split([n, n, n * n], dim=-1)
        return pre.sigmoid(), 2 * post.sigmoid(), comb.unflatten(-1, (n, n)).softmax(-1)


class HyperBlock(nn.Module):
    def __init__(self, streams: int, width: int):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.attn_hc, self.mlp_hc = Connection(streams, width), Connection(streams, width)

    def forward(self, x):
        for hc, norm, layer in (
            (self.attn_hc, self.attn_norm, self.attn),
            (self.mlp_hc, self.mlp_norm, self.mlp),
        ):
            pre, post, comb = hc(x)
            output = layer(norm((pre.unsqueeze(-1) * x).sum(2)))
            x = post.unsqueeze(-1) * output.unsqueeze(2) + comb.transpose(-1, -2) @ x
        return x


class ByFunction(HyperBlock):
    """Its norms are functions."""

    def __init__(self, streams: int, width: int):
        super().__init__(streams, width)
        self.attn_norm = self.mlp_norm = None

    def forward(self, x):
        for hc, layer in ((self.attn_hc, self.attn), (self.mlp_hc, self.mlp)):
            pre, post, comb = hc(x)
            output = layer(nn.functional.rms_norm((pre.unsqueeze(-1) * x).sum(2), x.shape[-1:]))
            x = post.unsqueeze(-1) * output.unsqueeze(2) + comb.transpose(-1, -2) @ x
        return x


class Opened(ByFunction):
    """The matrices of its MLP are called in the block."""

    def forward(self, x):
        pre, post, comb = self.attn_hc(x)
        hidden = self.mlp[0](nn.functional.rms_norm((pre.unsqueeze(-1) * x).sum(2), x.shape[-1:]))
        output = self.mlp[2](hidden.tanh())
        return post.unsqueeze(-1) * output.unsqueeze(2) + comb.transpose(-1, -2) @ x


class Reading(nn.Module):
    """The same, reading by itself, for streams that are added to and not mixed."""

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.inner = Connection(streams, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre, post, _ = self.inner(x)
        return post, (pre.unsqueeze(-1) * x).sum(2)


class Branching(HyperBlock):
    """Where nothing can follow it."""

    def forward(self, x):
        return super().forward(-x if float(x.detach().sum()) == 0.5 else x)


class Adding(HyperBlock):
    def __init__(self, streams: int, width: int):
        super().__init__(streams, width)
        self.attn_hc, self.mlp_hc = Reading(streams, width), Reading(streams, width)

    def forward(self, x):
        post, h = self.attn_hc(x)
        x = x + post.unsqueeze(-1) * self.attn(self.attn_norm(h)).unsqueeze(2)
        post, h = self.mlp_hc(x)
        return x + post.unsqueeze(-1) * self.mlp(self.mlp_norm(h)).unsqueeze(2)


class Hyper(nn.Module):
    """Hyper-connections in the manner of DeepSeek-V4."""

    def __init__(self, block=HyperBlock, blocks: int = 2, streams: int = 3, width: int = 64):
        super().__init__()
        self.streams = streams
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(block(streams, width) for _ in range(blocks))
        self.last_hc, self.last = Connection(streams, width), nn.RMSNorm(width)

    def forward(self, tokens):
        x = self.words(tokens).unsqueeze(2).expand(-1, -1, self.streams, -1).contiguous()
        for block in self.blocks:
            x = block(x)
        return self.head(self.last((self.last_hc(x)[0].unsqueeze(-1) * x).sum(2)))
