"""Patterns over the names of a model's modules, as `named_modules()` gives them."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from probes.manifest import RunError


def matching(root: nn.Module, patterns: str | Sequence[str], argument: str) -> dict[str, nn.Module]:
    """Modules whose name matches one of `patterns` (`*` matches anything), in the model's order.

    Raises RunError for a pattern that matches nothing, with the nearest names.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = dict(root.named_modules(remove_duplicate=False))
    del modules[""]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise RunError(
                f"{argument}={pattern!r} matches no module of {type(root).__name__}{_near(pattern, modules)}."
            )
    return {
        name: module
        for name, module in modules.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _near(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.4)
    return f": the nearest names are {', '.join(map(repr, near))}" if near else ""
