"""What Accelerate wraps around an optimizer: hooks belong on the one inside, and its loss scaler is beside it."""

import torch


def unwrap_optimizer(optimizer: object) -> tuple[object, torch.amp.GradScaler | None]:
    """The optimizer that updates the parameters, and the scaler of its wrapper if there is one."""
    scaler = None
    # A wrapper calls itself an optimizer without having been made as one.
    while isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" not in vars(optimizer):
        scaler = getattr(optimizer, "scaler", None) or scaler
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer, scaler
