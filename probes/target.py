"""Find what the command line names as `module:function`: a model and the batch it is called with.

The function takes no arguments. It returns a model; or `(model, batch)`; or a dict with `model` and, as far as
wanted, `batch`, `loss` and `optimizer`.
"""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from probes.manifest import RunError

_KEYS = ("model", "batch", "loss", "optimizer")
_EXAMPLE = "give module:function, as in train:build for the function build of train.py"


@dataclass(frozen=True)
class Target:
    """What `name` made: a model, the arguments of one forward, and what belongs to its training, None where not given.

    `loss` is a function of the model's output; without a batch `args` is None.
    """

    name: str
    model: nn.Module
    args: tuple | None = None
    kwargs: Mapping | None = None
    loss: Callable | None = None
    optimizer: torch.optim.Optimizer | None = None


def load(name: str) -> Target:
    """Call the function `name` ("module:function") and give what it returns.

    The module is looked for in the current directory first. Raises RunError, in one sentence: no such module or
    function, one that raises, needs arguments or returns something else.
    """
    module, colon, function = name.partition(":")
    if module.endswith(".py"):
        module = module.removesuffix(".py")
        meant = module.strip("./").replace("/", ".") + ":" + (function or "build")
        raise RunError(f"{name} is a file: name its module instead, as in {meant}.")
    if not (module and colon and function):
        raise RunError(f"{name!r} names no function: {_EXAMPLE}.")
    made = _called(name, _function(_imported(module), module, function))
    return _target(name, made)


def arguments(batch: object) -> tuple[tuple, Mapping]:
    """How a model is called with `batch`: a mapping by keyword, a tuple or list by position, else alone."""
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _imported(module: str) -> ModuleType:
    # A console script does not have the current directory on its path, and the module's own imports may come late.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise RunError(
                f"There is no module {module!r} in this folder or among the installed packages: {_EXAMPLE}."
            ) from None
        raise RunError(f"{module} cannot be imported: {said(error)}.") from error
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may well exit
        raise RunError(f"{module} cannot be imported: {said(error)}.") from error


def _function(module: ModuleType, path: str, name: str) -> Callable:
    found = getattr(module, name, None)
    if isinstance(found, nn.Module):
        raise RunError(f"{path}:{name} is a model: name a function that returns it.")
    if callable(found):
        return found
    if found is not None:
        raise RunError(f"{path}:{name} is no function but of type {type(found).__name__}: {_EXAMPLE}.")
    functions = [key for key, value in vars(module).items() if callable(value)]
    near = difflib.get_close_matches(name, functions, 1)
    hint = f"did you mean {path}:{near[0]}?" if near else f"{_EXAMPLE}."
    raise RunError(f"{path} has no function {name!r}: {hint}")


def _called(name: str, function: Callable) -> object:
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in (2, 4)  # *args, **kwargs
        ]
    except ValueError:  # a builtin without a signature
        needed = []
    if needed:
        raise RunError(
            f"{name} needs arguments ({', '.join(needed)}): name a function that can be called without any."
        )
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise RunError(f"{name} failed: {said(error)}.") from error


def _target(name: str, made: object) -> Target:
    wanted = "it must return a model, (model, batch), or a dict with model, batch, loss and optimizer"
    if isinstance(made, nn.Module):
        made = {"model": made}
    elif isinstance(made, tuple) and len(made) == 2:
        made = dict(zip(_KEYS, made, strict=False))
    if not isinstance(made, dict):
        raise RunError(f"{name} returned something of type {type(made).__name__}: {wanted}.")
    unknown = [key for key in made if key not in _KEYS]
    if unknown:
        raise RunError(f"{name} returned a dict with {', '.join(map(repr, unknown))}: {wanted}.")
    model, loss, optimizer = made.get("model"), made.get("loss"), made.get("optimizer")
    if not isinstance(model, nn.Module):
        raise RunError(
            f"{name} returned a model of type {type(model).__name__}, not a torch.nn.Module: {wanted}."
        )
    if loss is not None and not callable(loss):
        raise RunError(
            f"{name} returned a loss of type {type(loss).__name__}: give a function of the output."
        )
    args, kwargs = arguments(made["batch"]) if made.get("batch") is not None else (None, None)
    return Target(name, model, args, kwargs, loss, optimizer)


def said(error: BaseException) -> str:
    """Kind and text of an error, and the user's line that raised it."""
    lines = traceback.extract_tb(error.__traceback__)
    here = [line for line in lines if line.filename != __file__ and not line.filename.startswith("<frozen")]
    where = f" ({os.path.relpath(here[-1].filename)}, line {here[-1].lineno})" if here else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {text[0]}' if text else ''}".rstrip(".") + where
