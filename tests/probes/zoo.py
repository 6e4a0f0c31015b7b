"""Small transformers of many builds. Each notes by itself, where its code has them, its states and what it adds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, WORDS = 8, 17


class Notes:
    """States and outputs of one forward, with their gradients kept."""

    def __init__(self):
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def state(self, x: Tensor) -> Tensor:
        return self._kept(x, self.states)

    def output(self, x: Tensor) -> Tensor:
        return self._kept(x, self.outputs)

    @staticmethod
    def _kept(x: Tensor, place: list[Tensor]) -> Tensor:
        if NOTES[-1] is not None and x.requires_grad:
            x.retain_grad()
            place.append(x)
        return x


NOTES: list[Notes | None] = [None]  # the last one is written to


def state(x: Tensor) -> Tensor:
    return x if NOTES[-1] is None else NOTES[-1].state(x)


def output(x: Tensor) -> Tensor:
    return x if NOTES[-1] is None else NOTES[-1].output(x)


class Mixer(nn.Module):
    """Single-head attention."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class Sandwich(nn.Module):
    """A norm before and one after each sublayer; children in an order of their own."""

    def __init__(self):
        super().__init__()
        self.core, self.wide = Mixer(), mlp()
        self.after_core, self.before_core = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.after_wide, self.before_wide = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x):
        x = state(x) + output(self.after_core(self.core(self.before_core(x))))
        return state(x) + output(self.after_wide(self.wide(self.before_wide(x))))


class NormAfter(nn.Module):
    """Sublayers that receive the state itself; the norm is on what they add."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Mixer(), mlp()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x):
        x = state(x) + output(self.attn_norm(self.attn(x)))
        return state(x) + output(self.mlp_norm(self.mlp(x)))


class Parallel(nn.Module):
    """Attention and MLP read one norm side by side."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Mixer(), mlp()

    def forward(self, x):
        h = self.norm(state(x))
        state(x)
        return output(self.attn(h)) + output(self.mlp(h)) + x


class Bare(nn.Module):
    """Norms that are no modules."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Mixer(), mlp()

    def forward(self, x):
        x = state(x) + output(self.attn(F.rms_norm(x, (WIDTH,))))
        return state(x) + output(self.mlp(F.rms_norm(x, (WIDTH,))))


class Gated(nn.Module):
    """Conditioned norms and gates, as in a diffusion transformer; the condition is a vector of each item."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm_2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.token_mixing, self.channel_mixing = Mixer(), mlp()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, condition):
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=-1)
        inside = self.token_mixing(self.norm_1(state(x)) * (1 + scale) + shift)
        x = x + output(gate * inside)
        inside = self.channel_mixing(self.norm_2(state(x)) * (1 + scale_2) + shift_2)
        return x + output(gate_2 * inside)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves a layer out for some items."""

    def forward(self, x):
        keep = torch.rand(len(x), 1, 1) < 0.9
        return x * keep / 0.9 if self.training else x


class Scaled(nn.Module):
    """Layer scale and stochastic depth after each sublayer, as in many vision transformers."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(WIDTH),
            Mixer(),
            LayerScale(),
            DropPath(),
        )
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(WIDTH), mlp(), LayerScale(), DropPath()

    def forward(self, x):
        x = state(x) + output(self.drop_path1(self.ls1(self.attn(self.norm1(x)))))
        return state(x) + output(self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class Dropping(nn.Module):
    """One dropout for both layers, and a multiplier on what they add."""

    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.drop = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.2)
        self.a, self.f = Mixer(), mlp()

    def forward(self, x):
        x = state(x) + output(0.5 * self.drop(self.a(self.n1(x))))
        return state(x) + output(0.5 * self.drop(self.f(self.n2(x))))


class Branch(nn.Module):
    """A wrapper that adds for itself."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x):
        return state(x) + output(self.inner(self.norm(x)))


def branches() -> nn.Module:
    return nn.Sequential(Branch(Mixer()), Branch(mlp()))


class Decoding(nn.Module):
    """Three layers: self-attention, attention to a memory that may be missing, MLP."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.self_attn, self.cross_attn = Mixer(), nn.Linear(WIDTH, WIDTH)
        self.ffn = mlp()

    def forward(self, x, memory=None):
        x = state(x) + output(self.self_attn(self.norms[0](x)))
        if memory is not None:
            x = state(x) + output(self.cross_attn(self.norms[1](x)) * memory.mean())
        return state(x) + output(self.ffn(self.norms[2](x)))


class Model(nn.Module):
    """Embedding, blocks, final norm and head; blocks are called with what `more` says."""

    def __init__(self, block: Callable[[], nn.Module], more: tuple = (), blocks: int = 2):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.more = more

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, *self.more)
        return self.head(self.last(state(x)))


class Looped(nn.Module):
    """Lists of lists that nobody calls; the norms are inside the sublayers."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.trunk = Trunk()

    def forward(self, tokens):
        return self.head(self.trunk(self.words(tokens)))


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        pairs = [[nn.Sequential(nn.LayerNorm(WIDTH), f) for f in (Mixer(), mlp())] for _ in range(2)]
        self.layers = nn.ModuleList(map(nn.ModuleList, pairs))

    def forward(self, x):
        for attend, feed in self.layers:
            x = state(x) + output(attend(x))
            x = state(x) + output(feed(x))
        return self.norm(state(x))


class LoopedFlat(nn.Module):
    """The same in the module that embeds, with a wrapper that adds and a list of norms beside each sublayer."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.last = nn.LayerNorm(WIDTH)
        parts = [f for _ in range(2) for f in (Mixer(), mlp())]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), f, Add()]) for f in parts)

    def forward(self, tokens):
        x = self.words(tokens)
        for norm, f, add in self.layers:
            x = add(output(f(norm(state(x)))), x)
        return self.head(self.last(state(x)))


class Add(nn.Module):
    def forward(self, x, residual):
        return x + residual


class PostNorm(nn.Module):
    """Dropout in passing, and a norm of the sum: what is added is seen where the norm receives it."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Mixer(), mlp()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.attn_norm(state(x) + output(F.dropout(self.attn(x), 0.2, self.training)))
        return self.mlp_norm(state(x) + output(F.dropout(self.mlp(x), 0.2, self.training)))


class Pair(nn.Module):
    """Returns what it attended to first, and the stream second."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            Mixer(),
            nn.LayerNorm(WIDTH),
            mlp(),
        )

    def forward(self, x):
        seen = self.attn(self.norm_1(state(x)))
        x = x + output(seen)
        return seen, state(x) + output(self.mlp(self.norm_2(x)))


class Second(nn.Module):
    """A model of blocks that return their stream second."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            _, x = block(x)
        return self.head(state(x))


class Encoder(nn.Module):
    """torch's own encoder, which notes nothing."""

    def __init__(self, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, norm_first=norm_first, batch_first=True)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens):
        return self.head(self.encoder(self.words(tokens)))


CONDITION = (torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(7)),)
ZOO: dict[str, Callable[[], nn.Module]] = {
    "sandwich norms": lambda: Model(Sandwich),
    "norms after": lambda: Model(NormAfter),
    "side by side": lambda: Model(Parallel),
    "norms that are no modules": lambda: Model(Bare),
    "gates": lambda: Model(Gated, CONDITION),
    "layer scale and drop path": lambda: Model(Scaled),
    "one dropout for all": lambda: Model(Dropping),
    "wrappers that add": lambda: Model(branches),
    "three layers a block": lambda: Model(Decoding, CONDITION),
    "lists of lists": Looped,
    "lists of lists in the module that embeds": LoopedFlat,
    "norms of the sum": lambda: Model(PostNorm),
    "the stream second": Second,
}
