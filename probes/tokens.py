"""Token snapshots on the disk: the depth weights of two sequences, token by token. One file each; needs no torch."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probes.careful import is_folder
from probes.layout import Layout
from probes.shard import SUFFIX, ShardError, read_shard, write_shard
from probes.vocabulary import FORMAT_VERSION, TOKEN_WEIGHT, TRIANGLE

MOST_SEQUENCES, MOST_TOKENS = 2, 128

_NAME = re.compile(r"tokens-([0-9]{12,16})\.safetensors")
_ID = "token_id"


@dataclass(frozen=True)
class Tokens:
    """The depth weights of the followed sequences at one step.

    `weight` float32 [sequence, token, read, source], NaN where a source does not exist and for padding; `ids` int64
    [sequence, token], None where the model was not given token ids; `texts` their texts, None without `decode=`.
    """

    step: int
    weight: np.ndarray
    ids: np.ndarray | None
    texts: list[list[str]] | None


def write_tokens(
    folder: Path, step: int, weight: np.ndarray, ids: np.ndarray | None, texts: list[list[str]] | None
) -> None:
    """Seal a snapshot, `weight` [sequence, token, cells] packed. One that is there already stays as it is."""
    path = token_path(folder, step)
    if path.exists():
        return  # of the same step before the scaler skipped its update
    tensors = {TOKEN_WEIGHT.name: weight.astype(np.float16)} | ({} if ids is None else {_ID: ids})
    told = {} if texts is None else {"texts": json.dumps(texts, ensure_ascii=False)}
    write_shard(path, tensors, {"format": str(FORMAT_VERSION), "step": str(step)} | told)


def token_path(folder: Path, step: int) -> Path:
    return folder / f"tokens-{step:012d}{SUFFIX}"


def token_steps(folder: Path) -> list[int]:
    """Steps of the snapshots in a folder of shards, ascending."""
    if not is_folder(folder):
        return []
    try:
        found = [_NAME.fullmatch(entry.name) for entry in os.scandir(folder)]
    except OSError:
        return []
    return sorted(int(match[1]) for match in found if match is not None)


def read_tokens(folder: Path, step: int, layout: Layout) -> Tokens:
    """One snapshot. Raises ShardError when it cannot be trusted, FileNotFoundError when it is gone."""
    shard = read_shard(token_path(folder, step))
    weight, ids = shard.tensors.get(TOKEN_WEIGHT.name), shard.tensors.get(_ID)
    if (
        weight is None
        or weight.ndim != 3
        or weight.dtype.kind != "f"
        or weight.shape[2] != layout.cells(TRIANGLE)
    ):
        raise ShardError(f"holds no {TOKEN_WEIGHT.name} that fits run.json")
    if ids is not None and (ids.dtype != np.int64 or ids.shape != weight.shape[:2]):
        raise ShardError(f"holds {_ID} in shape {list(ids.shape)} beside weights of {list(weight.shape[:2])}")
    return Tokens(
        step, layout.unpack(weight, TRIANGLE), ids, _texts(shard.metadata.get("texts"), weight.shape)
    )


def _texts(told: str | None, shape: tuple[int, ...]) -> list[list[str]] | None:
    if told is None:
        return None
    try:
        texts = json.loads(told)
        fits = [[isinstance(text, str) for text in row] for row in texts] == [[True] * shape[1]] * shape[0]
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ShardError("holds texts that are not those of its tokens")
    return texts
