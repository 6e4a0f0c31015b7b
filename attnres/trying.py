"""Try somebody's model on an example: passes that leave no trace, and the tensor that a module hands on."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def first_tensor(value: object) -> Tensor | None:
    """The tensor that a module hands on: its output, or the first of several."""
    value = value[0] if isinstance(value, tuple | list) and value else value
    return value if isinstance(value, Tensor) else None


def with_first(output: Tensor | tuple | list, tensor: Tensor) -> Tensor | tuple | list:
    """The output of a module with another first tensor."""
    if not isinstance(output, tuple | list):
        return tensor
    # A named tuple takes its fields one by one.
    return getattr(output, "_make", type(output))((tensor, *output[1:]))


@contextmanager
def forked_random_numbers(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draws on the CPU and on the devices of these tensors leave their generators as they were."""
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([], device_type="cpu"))
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Passes in training mode that leave no trace: random numbers, buffers and modes are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    tensors = itertools.chain(model.parameters(), model.buffers())
    with forked_random_numbers(tensors), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        # On the CPU, where layers are dropped; elsewhere one pass draws what the others do as it is.
        torch.default_generator.manual_seed(0)
        model.train()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for module, mode in modes.items():
                module.training = mode


def run_watched(model: nn.Module, args: tuple, kwargs: dict, handles: Sequence[RemovableHandle]) -> None:
    """One forward pass without a trace, after which its hooks are gone."""
    try:
        with undisturbed(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
