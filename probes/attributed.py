"""What attribution found, and its file in a run: what the loss would be without each depth edge and each layer.

Needs no torch: `probes.attribute` makes an `Attribution`, `run.attributions()` reads them back.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from probes.careful import is_folder, printable
from probes.layout import Layout
from probes.shard import SUFFIX, ShardError, read_shard, write_shard
from probes.vocabulary import FORMAT_VERSION, MOST_STEP, TRIANGLE

FOLDER = "attribution"
GRADIENT, ABLATION, REMOVAL, INTEGRATED, SHAPLEY = "gradient", "ablation", "removal", "integrated", "shapley"
METHODS = {
    GRADIENT: "gradient × activation: how the target would change without it, to first order",
    ABLATION: "the target without this edge, minus the target with it",
    REMOVAL: "the target without the layer's output in every later read, minus the target with it",
    INTEGRATED: "integrated gradients: the slope, averaged while all edges of a read (or all layers) grow from 0 to 1",
    SHAPLEY: "Shapley values, sampled: the effect averaged over orders in which a read's edges (or the layers) are added",
}
TITLES = {
    GRADIENT: "Gradient × activation",
    ABLATION: "Ablation",
    REMOVAL: "Removal",
    INTEGRATED: "Integrated gradients",
    SHAPLEY: "Shapley values",
}
OF_EDGES = (GRADIENT, ABLATION, INTEGRATED, SHAPLEY)
OF_LAYERS = (GRADIENT, REMOVAL, INTEGRATED, SHAPLEY)
KEPT, SHARED = "kept", "shared"
MASS = {
    KEPT: "a removed source keeps its share of the softmax, so the mix shrinks",
    SHARED: "the other sources take over its share of the softmax",
}
# By what the least important is removed first; "random" is the mean of several orders.
WEIGHT, SHARE, EFFECT, RANDOM = "weight", "share", "attribution", "random"
RANKINGS = (WEIGHT, SHARE, EFFECT, RANDOM)
LAYERS, EDGES = "layers", "edges"
LOSS = "loss"  # the target that is worse where it is larger; of others neither direction is

_NAME = re.compile(r"([0-9]{12,16})-([0-9a-f]{12})\.safetensors")
_MOST_POINTS = 10_000


@dataclass(frozen=True)
class About:
    """What was attributed, how: `target` in words, its `value` on the `sequences` of `tokens` tokens each, `mass`.

    `unit` is that of the values. `checkpoint` and `data` are the names of files; `created` is in seconds since 1970. `notes`
    say what could not be attributed, and why.
    """

    target: str = LOSS
    unit: str = "nats per token"
    value: float = float("nan")
    mass: str = KEPT
    sequences: int = 0
    tokens: int = 0
    steps: int = 0
    samples: int = 0
    seed: int = 0
    checkpoint: str = ""
    data: str = ""
    created: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_loss(self) -> bool:
        return self.target == LOSS


@dataclass(frozen=True)
class Curve:
    """The target when `counts` [K] of the least important are removed: `values[ranking]` [K], of "random" [orders, K]."""

    counts: np.ndarray
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found, a value for each depth edge and each layer: target *without* it minus target *with* it.

    Of a loss, what is above zero is needed: the loss rises without it. `edges[method]` [R, S] and `layers[method]` [L]
    are means over sequences and their tokens, `edges_std` and `layers_std` standard deviations over the sequences,
    `edges_token_std` and `layers_token_std` over all tokens (for a loss of tokens, and methods that take differences); NaN
    where there is no such edge or it could not be reached.

    `weight` and `share` [R, S] are means over the same tokens: the weight of each source in each read, and the part
    w⟨v, h⟩/‖h‖² of what is read that it makes up; `final_share` [L+1] is that of source 0..L in the final state. `curves`
    has the what-ifs, "layers" and "edges". `step` is None where it is of no run.
    """

    layout: Layout
    about: About
    edges: dict[str, np.ndarray] = field(default_factory=dict)
    edges_std: dict[str, np.ndarray] = field(default_factory=dict)
    edges_token_std: dict[str, np.ndarray] = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    layers_std: dict[str, np.ndarray] = field(default_factory=dict)
    layers_token_std: dict[str, np.ndarray] = field(default_factory=dict)
    weight: np.ndarray | None = None
    share: np.ndarray | None = None
    final_share: np.ndarray | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    step: int | None = None
    name: str = ""

    @property
    def loss(self) -> float:
        """The target of the model as it is."""
        return self.about.value

    @property
    def mass(self) -> str:
        return self.about.mass


_STATISTICS = {"": "", ".sequence_std": "_std", ".token_std": "_token_std"}


def attribution_path(run: Path, step: int, digest: str) -> Path:
    return run / FOLDER / f"{step:012d}-{digest}{SUFFIX}"


def attribution_names(run: Path) -> list[str]:
    """Names of the attribution files of a run, by step."""
    if not is_folder(run / FOLDER):
        return []
    try:
        names = [entry.name for entry in os.scandir(run / FOLDER)]
    except OSError:
        return []
    return sorted(name for name in names if _NAME.fullmatch(name))


def write_attribution(path: Path, found: Attribution) -> None:
    """Seal what was found. Raises OSError when the disk refuses, FileExistsError where the file is there already."""
    layout, tensors = found.layout, {}
    for kind in (EDGES, LAYERS):
        for suffix, more in _STATISTICS.items():
            for method, values in getattr(found, kind + more).items():
                packed = layout.pack(values) if kind == EDGES else values
                tensors[f"{kind}.{method}{suffix}"] = packed.astype(np.float32)
    for name in ("weight", "share"):
        if (values := getattr(found, name)) is not None:
            tensors[name] = layout.pack(values).astype(np.float32)
    if found.final_share is not None:
        tensors["final_share"] = found.final_share.astype(np.float32)
    for kind, curve in found.curves.items():
        tensors[f"without.{kind}.count"] = curve.counts.astype(np.int64)
        for ranking, values in curve.values.items():
            tensors[f"without.{kind}.{ranking}"] = values.astype(np.float32)
    about = asdict(found.about) | {"value": repr(found.about.value)}
    path.parent.mkdir(exist_ok=True)
    told = {"format": str(FORMAT_VERSION), "step": str(found.step), "about": json.dumps(about)}
    write_shard(path, tensors, told)


def read_attribution(run: Path, name: str, layout: Layout) -> Attribution:
    """One file. Raises ShardError where it cannot be trusted, FileNotFoundError where it is gone."""
    shard = read_shard(run / FOLDER / name)
    step = int(_NAME.fullmatch(name)[1])
    if shard.metadata.get("step") != str(step) or step > MOST_STEP:
        raise ShardError("is of another step than its name says")
    found = Attribution(layout, _about(shard.metadata.get("about", "")), step=step, name=name)
    curves: dict[str, dict[str, np.ndarray]] = {}
    for key, values in shard.tensors.items():
        kind, _, rest = key.partition(".")
        if kind in (EDGES, LAYERS):
            method, dot, suffix = rest.partition(".")
            if method not in METHODS or dot + suffix not in _STATISTICS:
                continue  # of a later depthscope
            shaped = _shaped(key, values, layout.cells(TRIANGLE) if kind == EDGES else len(layout.layers))
            getattr(found, kind + _STATISTICS[dot + suffix])[method] = (
                layout.unpack(shaped) if kind == EDGES else shaped
            )
        elif key in ("weight", "share"):
            object.__setattr__(found, key, layout.unpack(_shaped(key, values, layout.cells(TRIANGLE))))
        elif key == "final_share":
            object.__setattr__(found, key, _shaped(key, values, len(layout.layers) + 1))
        elif kind == "without":
            kind, _, ranking = rest.partition(".")
            if kind in (EDGES, LAYERS) and ranking in (*RANKINGS, "count"):
                curves.setdefault(kind, {})[ranking] = values
    for kind, parts in curves.items():
        found.curves[kind] = _curve(kind, parts)
    return found


def _shaped(name: str, values: np.ndarray, count: int) -> np.ndarray:
    if values.dtype.kind != "f" or values.shape != (count,):
        raise ShardError(f"holds {name} in shape {list(values.shape)}, which does not fit run.json")
    return values.astype(np.float32)


def _curve(kind: str, parts: dict[str, np.ndarray]) -> Curve:
    counts = parts.pop("count", None)
    if counts is None or counts.dtype != np.int64 or counts.ndim != 1 or not 0 < len(counts) < _MOST_POINTS:
        raise ShardError(f"does not say how many {kind} are removed")
    for ranking, values in parts.items():
        wanted = 2 if ranking == RANDOM else 1
        if values.dtype.kind != "f" or values.ndim != wanted or values.shape[-1] != len(counts):
            raise ShardError(f"holds values of {kind} by {ranking} in shape {list(values.shape)}")
    return Curve(counts, parts)


def _is_float(name: str) -> bool:
    return isinstance(About.__dataclass_fields__[name].default, float)


def _about(told: str) -> About:
    """Checked field by field: a stranger may have written it."""
    try:
        data = json.loads(told)
        known: Mapping = {key: data[key] for key in About.__dataclass_fields__ if key in data}
        for key, value in known.items():
            default = About.__dataclass_fields__[key].default
            if key == "value":
                continue
            kinds = (int, float) if _is_float(key) else (list,) if key == "notes" else (type(default),)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(key)
        numbers = {key: float(value) for key, value in known.items() if _is_float(key)}
        texts = {
            key: printable(value)
            for key, value in known.items()
            if isinstance(value, str) and key not in numbers
        }
        notes = tuple(printable(note) for note in known.get("notes", ())[:20])
        return About(**{**known, **texts, **numbers, "notes": notes})
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ShardError(f"does not say what was attributed ({printable(error)})") from error
