"""What if? The target when the least important layers or edges are removed, by several rankings of importance."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from probes.attributed import (
    ABLATION,
    EDGES,
    EFFECT,
    GRADIENT,
    INTEGRATED,
    LAYERS,
    RANDOM,
    REMOVAL,
    SHAPLEY,
    SHARE,
    WEIGHT,
    Attribution,
    Curve,
)
from probes.effects import Effects
from probes.gates import Gates
from probes.objective import token_means

MANY_EDGES = "edges of many reads"
ORDERS = 3  # random ones
_MOST = {LAYERS: 33, EDGES: 21}  # points of a curve
_TRUSTED = {
    LAYERS: (REMOVAL, SHAPLEY, INTEGRATED, GRADIENT),
    EDGES: (ABLATION, SHAPLEY, INTEGRATED, GRADIENT),
}


@dataclass(frozen=True)
class Plan:
    """Remove the first `counts[k]` of `order`: flat indices of edges in [R, S], or of layers."""

    kind: str
    ranking: str
    number: int
    order: np.ndarray
    counts: np.ndarray

    @property
    def key(self) -> str:
        return f"{self.kind}.{self.ranking}.{self.number}"

    @property
    def kin(self) -> str:
        return LAYERS if self.kind == LAYERS else MANY_EDGES

    @property
    def passes(self) -> int:
        return int(np.count_nonzero(self.counts))

    def run(self, effects: Effects) -> np.ndarray:
        """[B, K] targets."""
        found = []
        for count in self.counts.tolist():
            shape = effects.exists.shape if self.kind == EDGES else effects.layers.shape[1:]
            removed = torch.zeros(shape, dtype=torch.bool, device=effects.layers.device)
            removed.view(-1)[torch.as_tensor(self.order[:count].copy(), device=removed.device)] = True
            if not count:
                value = effects.base
            elif self.kind == EDGES:
                value = effects.without(removed)
            else:
                value = effects.without(layers=removed)
            found.append(token_means(value).double().cpu().numpy())
        return np.stack(found, 1)


def once(gates: Gates) -> dict[str, Callable[[Effects], object]]:
    """One pass of each kin of plans. Edges of all reads at once take more than those of one."""

    def layer(e: Effects) -> object:
        return e.without(layers=torch.arange(e.layers.shape[1], device=e.layers.device) == 0)

    def edges(e: Effects) -> object:
        half = torch.arange(e.exists.numel(), device=e.exists.device).view(e.exists.shape) % 2 == 0
        return e.without(half)

    return {LAYERS: layer} | ({} if gates.no_edges else {MANY_EDGES: edges})


def plans(found: Attribution, gates: Gates, seed: int) -> list[Plan]:
    """Each ranking of layers and of edges that is known, and some random orders."""
    made = []
    for kind in _kinds(gates):
        counts, able = _counts(kind, gates), _able(kind, gates)
        for ranking, score in scores(found, kind).items():
            known = np.where(np.isfinite(score.ravel()[able]), score.ravel()[able], np.inf)
            made.append(Plan(kind, ranking, 0, able[np.argsort(known, kind="stable")], counts))
        random = np.random.default_rng(seed)
        made += [Plan(kind, RANDOM, number, random.permutation(able), counts) for number in range(ORDERS)]
    return made


def scores(found: Attribution, kind: str) -> dict[str, np.ndarray]:
    """Importance of layers [L] or edges [R, S], by ranking; without those that are not known.

    Weights and shares of edges are in even shares of their read (times the number of its sources): else the reads of many
    sources would lose all they have first. Layers by weight are known where every column is one layer's: the mean over the
    reads of it, in even shares.
    Attribution is that of the method nearest to removing: of layers their removal, of edges their ablation; its size where
    the target is no loss, for then it is no better to fall than to rise.
    """
    layout, made = found.layout, {}
    counts = np.array([read.sources for read in layout.reads])[:, None]
    if kind == EDGES:
        for name, values in ((WEIGHT, found.weight), (SHARE, found.share)):
            made[name] = None if values is None or not _tells(values) else np.abs(values) * counts
    else:
        single = [source.first == source.last == n for n, source in enumerate(layout.sources)]
        if (
            found.weight is not None
            and _tells(found.weight)
            and all(single)
            and len(single) == len(layout.layers) + 1
        ):
            even = found.weight * counts
            there = np.isfinite(even)
            made[WEIGHT] = (np.where(there, even, 0).sum(0) / np.maximum(there.sum(0), 1))[1:]
        made[SHARE] = None if found.final_share is None else np.abs(found.final_share[1:])
    values = getattr(found, kind)
    effect = next((values[method] for method in _TRUSTED[kind] if method in values), None)
    made[EFFECT] = effect if effect is None or found.about.is_loss else np.abs(effect)
    return {name: score for name, score in made.items() if score is not None and _tells(score)}


def curves(plans: list[Plan], values: dict[str, np.ndarray]) -> dict[str, Curve]:
    """The curves of what was measured, by kind."""
    found: dict[str, Curve] = {}
    for plan in plans:
        curve = found.setdefault(plan.kind, Curve(plan.counts, {}))
        if plan.ranking == RANDOM:
            before = curve.values.get(RANDOM)
            mine = values[plan.key][None]
            curve.values[RANDOM] = mine if before is None else np.concatenate([before, mine])
        else:
            curve.values[plan.ranking] = values[plan.key]
    return found


def _tells(score: np.ndarray) -> bool:
    """Whether a ranking tells anything apart: the weights of a plain sum are all one."""
    known = score[np.isfinite(score)]
    return len(known) > 1 and float(np.ptp(known)) > 1e-12


def _kinds(gates: Gates) -> list[str]:
    return [LAYERS] if gates.no_edges else [LAYERS, EDGES]


def _able(kind: str, gates: Gates) -> np.ndarray:
    """Flat indices of what can be removed."""
    edges = gates.layout.triangle() & np.array(gates.reached)[:, None]
    there = np.array(gates.gated) if kind == LAYERS else edges
    return np.flatnonzero(there.ravel())


def _counts(kind: str, gates: Gates) -> np.ndarray:
    most = len(_able(kind, gates))
    return np.unique(np.linspace(0, most, min(most + 1, _MOST[kind])).round().astype(np.int64))
