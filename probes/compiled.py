"""Models that torch.compile has already run: it does not look at hooks that come later."""

import logging

import torch
from torch import nn

from probes.manifest import RunError

log = logging.getLogger("depthscope")

_BEFORE = "Call probes.record before a compiled model first runs, and train the very module that was passed."


def prepare_compiler(root: nn.Module) -> None:
    """Make sure that torch.compile sees the hooks on `root`; RunError when `root` or a part of it has run compiled.

    torch.compile would use the code of an unprobed model of the same class for this one, too: it leaves hooks out
    of what it compares. So it is told to compare them, and what it compiled before is cleared; that is compiled
    again when it is next called.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    codes = _compiled_codes()
    if not codes:
        return
    for name, module in root.named_modules():
        if any(_was_traced(p) for p in module.parameters(recurse=False)):
            raise RunError(
                f"{type(root).__name__} has already run compiled (seen at {name or 'its own parameters'!r}), and "
                "compiled code ignores hooks that come later: call probes.record before the first compiled call, "
                "or torch.compiler.reset() just before probes.record."
            )
    own = {
        type(module).forward.__code__
        for module in root.modules()
        if hasattr(type(module).forward, "__code__")
    }
    if codes & (own | _DOORS):
        log.info("depthscope clears torch.compile's caches, so that this model is compiled with its probes.")
        torch.compiler.reset()


def advice(root: nn.Module, otherwise: str) -> str:
    """What to do where nothing was seen of `root`: `otherwise`, if no part of it is compiled."""
    compiled = any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in root.modules()
    )
    return _BEFORE if compiled or any(map(_was_traced, root.parameters())) else otherwise


# Where torch.compile enters a module.
_DOORS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


def _compiled_codes() -> set:
    """Code that dynamo has compiled since its last reset."""
    seen = getattr(getattr(torch._dynamo.convert_frame, "input_codes", None), "seen", [])
    return {code for code in (reference() for reference in seen) if code is not None}


def _was_traced(parameter: nn.Parameter) -> bool:
    # Dynamo marks what it takes for a module's parameter. A vector alone is not enough: small compiled functions
    # inside eager models are given gains.
    return parameter.ndim > 1 and getattr(parameter, "_dynamo_static_input_type", None) == "unguarded"
