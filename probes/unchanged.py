"""Train on somebody's model for a moment and leave it as it was."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """A block that may train `model` with `optimizer`; what it changes is put back bit by bit, also on an error.

    Parameters, buffers, gradients, training mode, the optimizer's state and the random generators. The copies
    wait in the host's memory, so that the device needs no more than training does. What a module keeps outside
    its parameters and buffers is its own affair.
    """
    put_back = [*_tensors(model), *_states(optimizer), *generators(model)]
    gradients = {p: p.grad for p in model.parameters()}  # set aside, not overwritten: no copy is needed
    modes = {module: module.training for module in model.modules()}
    for p in gradients:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for each in put_back:
                each()
        for p, gradient in gradients.items():
            p.grad = gradient
        for module, training in modes.items():
            module.training = training


def _copied(tensor: Tensor) -> Callable[[], None]:
    kept = tensor.detach().to("cpu", copy=True)
    return lambda: tensor.detach().copy_(kept)


def _tensors(model: nn.Module) -> Iterator[Callable[[], None]]:
    for p in model.parameters():
        yield _copied(p)
    for module in model.modules():
        buffers = dict(module._buffers)
        # A buffer may be replaced by another tensor rather than written to.
        yield lambda module=module, buffers=buffers: (
            module._buffers.clear(),
            module._buffers.update(buffers),
        )
        for buffer in buffers.values():
            if buffer is not None:
                yield _copied(buffer)


def _states(optimizer: torch.optim.Optimizer | None) -> Iterator[Callable[[], None]]:
    if optimizer is None:
        return
    # The very tensors, for load_state_dict would cast them to the type of their parameters.
    kept = {p: dict(state) for p, state in optimizer.state.items()}
    plain = {
        p: {key: copy.deepcopy(value) for key, value in state.items() if not isinstance(value, Tensor)}
        for p, state in kept.items()
    }
    for state in kept.values():
        yield from (_copied(value) for value in state.values() if isinstance(value, Tensor))

    def put_back() -> None:
        optimizer.state.clear()
        for p, state in kept.items():
            optimizer.state[p] = state | plain[p]

    yield put_back


def generators(model: nn.Module) -> list[Callable[[], None]]:
    """Functions that put the random generators back to where they are now."""
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    back = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numbers),
        lambda: torch.set_rng_state(cpu),
    ]
    for device in {p.device for p in model.parameters()} - {torch.device("cpu")}:
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
            back.append(lambda device=device, state=state: torch.cuda.set_rng_state(state, device))
    return back
