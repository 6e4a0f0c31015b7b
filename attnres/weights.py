"""What a conversion saves with the model, and takes back: the reads' parameters, and the eps of their key norms."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from attnres.residual import Block, Full

NAME = "attnres"
EPS = "eps_bits"


def take(reads: Full | Block, saved: dict[str, Tensor], folder: str | Path) -> None:
    """Take the parameters saved in a folder; ValueError where they are not those of such reads, or of this eps."""
    expected = reads.state_dict()
    saved = {EPS: expected[EPS]} | saved  # the first versions did not save it
    if saved[EPS].item() != expected[EPS].item():
        eps = saved[EPS].view(torch.float64).item()
        raise ValueError(f"weights: {str(folder)!r} was saved with eps={eps:g}: give the same eps, or none.")
    shapes, wanted = ({name: tuple(x.shape) for name, x in each.items()} for each in (saved, expected))
    if shapes != wanted:
        raise ValueError(
            f"weights: {str(folder)!r} holds the reads of a model of another depth, width or residual: convert the model "
            "that was saved."
        )
    reads.load_state_dict(saved)


def check_eps(reads: Full | Block, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """ValueError before a state dict is loaded that was saved with another eps: it is no parameter, but it counts."""
    saved = state_dict.get(f"{prefix}{EPS}")
    if saved is not None and not saved.is_meta and saved.item() != reads.eps_bits.item():
        eps = saved.cpu().view(torch.float64).item()
        raise ValueError(
            f"eps: the state dict was saved with {eps:g}: convert the model with eps={eps:g} to load it."
        )


def saved_reads(folder: Path) -> dict[str, Tensor]:
    """The reads' parameters in a folder of safetensors files, saved by the converted module or one that holds it.

    ValueError where there are none, or those of several.
    """
    found, owners = {}, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                owner, separator, rest = f".{name}".rpartition(f".{NAME}.")
                if separator:
                    owners.add(owner.removeprefix("."))
                    found[rest] = file.get_tensor(name)
    if len(owners) > 1:
        raise ValueError(
            f"weights: {str(folder)!r} holds the reads of several converted modules, {', '.join(sorted(owners))}: load its "
            "tensors with load_state_dict instead."
        )
    if not found:
        raise ValueError(
            f"weights: no safetensors file in {str(folder)!r} holds parameters of a converted model."
        )
    return found
