"""Names of found layers, and which of them are one transformer block: by the names of their parameters."""

from collections import Counter
from itertools import takewhile

from torch import nn


def common_name(parameters: dict[str, nn.Parameter]) -> str:
    """The module that holds the matrices among `parameters`; where none does, the one that holds most of them."""
    matrices = [name for name, p in parameters.items() if p.ndim > 1 and min(p.shape) > 1]
    names = [name.rpartition(".")[0] for name in matrices or parameters]
    if not names:
        return ""
    groups = Counter(map(_group, names))
    most = max(groups, key=groups.get)
    return _common(names) or _common([name for name in names if _group(name) == most])


def _common(names: list[str]) -> str:
    levels = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def blocks_of(layers: list[tuple[str, str]]) -> list[int]:
    """The transformer block of each layer: by the first number in its name; where that is each layer's own, attention
    and the MLP after it are one."""
    groups = [_group(name) for name, _ in layers]
    alone = len(set(groups)) == len(groups)
    blocks: list[int] = []
    for place, (_, kind) in enumerate(layers):
        if place == 0:
            blocks.append(1)
            continue
        before = layers[place - 1][1]
        same = (before == "attention" and kind == "mlp") if alone else groups[place] == groups[place - 1]
        blocks.append(blocks[-1] + (not same))
    return blocks


def _group(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def stem(name: str) -> str:
    """The list that a parameter belongs to; the outermost module where it belongs to none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:number])


def is_matrix(p: nn.Parameter) -> bool:
    return p.ndim > 1 and min(p.shape) > 1
