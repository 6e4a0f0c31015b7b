"""Checkpoints: a model's parameters in a file, and the model they belong to, from a run's own configuration.

Importing this needs no torch; reading a checkpoint does.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from probes.manifest import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from probes import Run

FOLDER = "checkpoints"
_SUFFIX = ".safetensors"
_INSIDE = ("model", "state_dict", "model_state_dict")  # where trainers put the parameters
_WRAPPED = ("_orig_mod.", "module.")  # what torch.compile and data parallelism prefix


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"{step:012d}{_SUFFIX}"


def checkpoints(run: Path) -> list[Path]:
    """Those that a training saved into its run, by step."""
    return sorted(path for path in (run / FOLDER).glob(f"*{_SUFFIX}") if path.stem.isdecimal())


@dataclass(frozen=True)
class Checkpoint:
    """The parameters in a file, the step it tells, if it does, and a digest of its bytes."""

    path: Path
    state: "Mapping[str, Tensor]"
    step: int | None
    digest: str


def read_checkpoint(path: Path) -> Checkpoint:
    """From a safetensors file, or one of torch.save. Raises RunError for anything else."""
    if not path.is_file():
        raise RunError(f"There is no checkpoint {path}: give the file that holds the model's parameters.")
    try:
        state, step = _read(path)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise RunError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}{': ' + reason[0][:200] if reason else ''}): give a "
            "safetensors file, or one of torch.save that holds tensors alone."
        ) from error
    if not state:
        raise RunError(f"{path} holds no parameters: give a model's state dict.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(path, {_unwrapped(name): x for name, x in state.items()}, step, digest)


def _read(path: Path) -> "tuple[Mapping[str, Tensor], int | None]":
    import torch

    if path.suffix == _SUFFIX:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("step", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return state, int(told) if told.isdecimal() else None
    data = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(data, Mapping):
        raise ValueError(f"it holds a {type(data).__name__}")
    inside = next((data[key] for key in _INSIDE if isinstance(data.get(key), Mapping)), data)
    told = next(
        (data[key] for key in ("step", "global_step", "steps_done") if isinstance(data.get(key), int)), None
    )
    return {name: x for name, x in inside.items() if isinstance(x, torch.Tensor)}, told


def _unwrapped(name: str) -> str:
    for prefix in _WRAPPED:
        name = name.replace(prefix, "") if prefix == "_orig_mod." else name.removeprefix(prefix)
    return name


def take(model: "nn.Module", checkpoint: Checkpoint) -> None:
    """Give the model the parameters. Raises RunError naming the first that differs."""
    import torch

    wanted = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    wanted = {_unwrapped(name): (name, x) for name, x in wanted.items()}
    given, where = checkpoint.state, checkpoint.path.name
    for name, (_, x) in wanted.items():
        if name not in given:
            lacks = f"it has no {name}, which the model has"
            raise RunError(f"{where} is of another model: {lacks}.")
        if given[name].shape != x.shape:
            raise RunError(
                f"{where} is of another model: its {name} is {_size(given[name])}, and the model's is {_size(x)}."
            )
    for name in given:
        if name not in wanted:
            raise RunError(f"{where} is of another model: it has {name}, which the model has not.")
    try:
        model.load_state_dict({own: given[name] for name, (own, _) in wanted.items()})
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{where} does not fit the model: {str(error).splitlines()[0]}") from error


def _size(x: "Tensor") -> str:
    return "×".join(map(str, x.shape)) or "one number"


def own_model(run: "Run") -> "nn.Module":
    """The model that a run of depthscope's own decoder was recorded of. Raises RunError for any other run."""
    from attnres import Decoder, DecoderConfig

    names = {each.name for each in fields(DecoderConfig)}
    if not names <= set(run.config):
        what = (
            "was recorded without its model’s configuration"
            if not run.config
            else "is of a model of your own"
        )
        raise RunError(f"{run.name} {what}: say how it is made with --model module:function.")
    try:
        return Decoder(DecoderConfig(**{name: run.config[name] for name in names}))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"The configuration of {run.name} makes no model ({error}): say how it is made with --model module:function."
        ) from error
