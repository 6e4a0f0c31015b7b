"""The scale of the loss in mixed-precision training, without a read back to the host.

Gradients of a scaled loss are scaled. They are recorded divided by the scale: the one of the GradScaler that
was passed, or the one that a fused optimizer is handed. Where a loss is evidently scaled and nobody says by how
much, gradients stay blank.
"""

import logging
import sys

import torch
from torch import Tensor

from probes.manifest import RunError

log = logging.getLogger("depthscope")


class LossScale:
    """`scaler` is a torch.amp.GradScaler, or None. Raises RunError for anything else."""

    def __init__(self, scaler: torch.amp.GradScaler | None):
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise RunError(f"scaler must be a torch.amp.GradScaler, not a {type(scaler).__name__}.")
        self._scaler = scaler
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self.value: Tensor | None = None  # the scale of this step's gradients, [] on the device
        self.unknown = False

    @property
    def given(self) -> bool:
        return self._scaler is not None

    def at_backward(self, like: Tensor) -> None:
        """A backward pass has ended: its scale is the scaler's, until `update()` changes that."""
        if self._scaler is not None:
            self.value = self._scaler.scale(torch.ones((), device=like.device))

    def at_step(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """The optimizer is about to step: the scale that is still in its gradients, None without."""
        now = getattr(optimizer, "grad_scale", None)
        if self._scaler is None:
            self.value = now
            self.unknown = now is None and _called_by_scaler(optimizer)
        return now

    def known(self) -> bool:
        """Whether this step's gradients can be told; warns the first time that they cannot."""
        if self.unknown and not self._warned:
            self._warned = True
            log.warning(
                "depthscope leaves gradients blank, for the loss is scaled by a GradScaler it does not know: pass "
                "scaler= to probes.record."
            )
        return not self.unknown


def found_inf(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Of a fused optimizer inside a GradScaler's step: 1 where it skips its update, else 0, [] on the device."""
    found = getattr(optimizer, "found_inf", None)
    return found.detach().reshape(()).clamp(max=1) if isinstance(found, Tensor) else None


def half_precision(device: str) -> bool:
    """Whether float16 autocast is on, which needs a scaled loss."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


_STEP = torch.amp.GradScaler.step.__code__


def _called_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    if found_inf(optimizer) is not None:
        return True
    # An optimizer that is not fused does not learn who divided its gradients; the call stack knows.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _STEP:
            return True
        frame = frame.f_back
    return False
