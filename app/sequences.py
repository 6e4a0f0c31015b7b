"""Sequences of tokens to attribute on, from a file or from the text a run was trained on. Needs torch when called."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app import words
from probes.manifest import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from probes import Run

_ARRAYS = (".npy", ".safetensors")


def sequences(path: Path, count: int, context: int, or_fewer: bool = False) -> np.ndarray:
    """int64 [count, context]: token ids from a .npy or .safetensors file of integers, [N] or [N, T], the bytes of what a
    training on a .zip file keeps for validation, or those of any other file, evenly spread over it. RunError where it has too few; of a file of sequences that are shorter they are
    taken whole where `or_fewer` tokens will do."""
    ids = _ids(path)
    if ids.ndim == 2:
        if or_fewer and ids.shape[1] > 1:
            context = min(context, ids.shape[1])
        if len(ids) < count or ids.shape[1] < context:
            raise RunError(
                f"{path.name} holds {words.counted(len(ids), 'sequence')} of {ids.shape[1]} tokens, and {count} of {context} are asked for: "
                "give more, or ask for less with --sequences and --context."
            )
        chosen = np.linspace(0, len(ids) - 1, count).round().astype(int)
        return ids[chosen, :context]
    return windows(ids, count, context, path.name)


def windows(ids: np.ndarray, count: int, context: int, name: str) -> np.ndarray:
    """int64 [count, context]: windows of a text that do not overlap, evenly spread. RunError where it is too short."""
    if len(ids) < count * context:
        raise RunError(
            f"{name} holds {len(ids):,} tokens, and {words.counted(count, 'sequence')} of {context} take {count * context:,}: give more, or "
            "ask for less with --sequences and --context."
        )
    starts = np.linspace(0, len(ids) - context, count).astype(int)
    return np.stack([ids[start : start + context] for start in starts]).astype(np.int64)


def own_text(run: "Run") -> tuple[str, np.ndarray]:
    """Name and bytes of the validation text of a run that learned Python's own library, if this is the same. RunError else."""
    from attnres import Corpus

    told = run.config.get("corpus")
    corpus = Corpus.standard_library()
    if not isinstance(told, dict) or told.get("sha256") != corpus.sha256:
        raise RunError(
            f"{run.name} did not learn the Python library that is installed here: give the text with --data FILE."
        )
    return f"validation part of {corpus.name}", corpus.validation.numpy().astype(np.int64)


def check_vocabulary(model: "nn.Module", tokens: "Tensor", name: str) -> None:
    """RunError where a token is not in the model's vocabulary, as far as an embedding tells its size."""
    from torch import nn

    if int(tokens.min()) < 0:
        raise RunError(f"{name} holds the token {int(tokens.min())}: ids are counted from 0.")
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:
        embedding = None
    if embedding is None:  # the largest: positions are embedded too
        every = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        embedding = max(every, key=lambda each: each.num_embeddings, default=None)
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and int(tokens.max()) >= size:
        raise RunError(
            f"{name} holds the token {int(tokens.max())}, and the model knows {size} tokens: 0 to {size - 1}. Give the ids "
            "that its own tokenizer makes, as a .npy file."
        )


def _ids(path: Path) -> np.ndarray:
    if not path.is_file():
        raise RunError(f"There is no file {path} to take tokens from.")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                if not file.read(6) == b"\x93NUMPY":  # numpy would advise to unpickle it
                    raise ValueError("it is no array that numpy saved")
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"it holds {len(tensors)} tensors, not one of token ids")
            (found,) = tensors.values()
        elif path.suffix == ".zip":
            from attnres import Corpus

            return Corpus.from_path(path).validation.numpy().astype(np.int64)
        else:
            return np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)
    except Exception as error:  # numpy and safetensors have each their own for a broken file
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise RunError(f"{path} cannot be read: {reason}.") from error
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2):
        raise RunError(
            f"{path.name} holds {found.dtype} {list(found.shape)}: token ids are integers, [N] or [N, T]."
        )
    return found.astype(np.int64)
