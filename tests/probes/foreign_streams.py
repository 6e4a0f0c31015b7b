"""No depth reads: what a layer receives is scaled, gated or mixed, but no read weighs what layers made."""

import torch
from torch import nn

from tests.probes.foreign_families import WIDTH, Family, rms
from tests.probes.foreign_sources import GatedByState, ScaledStream


class Hyper(Family):
    """Static hyper-connections, streams in a list."""

    def __init__(self):
        super().__init__(6)
        self.mixing = nn.Parameter(torch.randn(6, 3, 3))
        self.writing, self.reading = (nn.Parameter(torch.randn(6, 3)) for _ in range(2))

    def stream(self, x):
        streams = [x, x, x]
        for i, layer in enumerate(self.sublayers):
            output = layer(self.norms[i](sum(self.reading[i, j] * streams[j] for j in range(3))))
            streams = [
                sum(self.mixing[i, k, j] * streams[j] for j in range(3)) + self.writing[i, k] * output
                for k in range(3)
            ]
        return sum(streams)


class HyperByToken(Hyper):
    """By the token, from each stream's own values."""

    def __init__(self):
        super().__init__()
        self.by_token = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(6))

    def stream(self, x):
        streams = [x, x, x]
        for i, layer in enumerate(self.sublayers):
            shift = [torch.tanh(self.by_token[i](rms(each))) for each in streams]
            read = sum((self.reading[i, j] + shift[j][..., 3:]) * streams[j] for j in range(3))
            output = layer(self.norms[i](read))
            streams = [
                sum((self.mixing[i, k, j] + shift[j][..., k : k + 1]) * streams[j] for j in range(3))
                + self.writing[i, k] * output
                for k in range(3)
            ]
        return sum(streams)


class HyperStacked(Hyper):
    """Streams on an axis of their own, weights by token."""

    def stream(self, x):
        streams = x.unsqueeze(2).repeat(1, 1, 3, 1)
        for i, layer in enumerate(self.sublayers):
            share = torch.softmax(self.reading[i] + rms(streams).mean(-1), -1)
            output = layer(self.norms[i](torch.einsum("btsd,bts->btd", streams, share)))
            streams = torch.einsum("ks,btsd->btkd", self.mixing[i], streams)
            streams = streams + output.unsqueeze(2) * self.writing[i].view(1, 1, 3, 1)
        return streams.mean(2)


class ScaledResidual(ScaledStream):
    """A plain residual that is scaled, with a share of the embedding."""

    def stream(self, x):
        first = x
        for i in range(0, 6, 2):
            x = self.keep[i] * x + self.first[i] * first
            x = x + self.sublayers[i](rms(x))
            x = x + self.sublayers[i + 1](rms(x))
        return x


class Highway(GatedByState):
    def stream(self, x):
        for i, layer in enumerate(self.sublayers):
            gate = self.gate(i, x)
            x = (1 - gate) * x + gate * layer(rms(x))
        return x


NO_READS = {each.__name__: each for each in (Hyper, HyperByToken, HyperStacked, ScaledResidual, Highway)}
