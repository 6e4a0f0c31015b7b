"""Make an existing PreNorm model an AttnRes one in place, and back."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from attnres.carrying import Enter, attach, depth_outputs
from attnres.checks import check_count, check_is, check_not_negative
from attnres.depth import AttentiveDepth
from attnres.joining import check_sequential
from attnres.residual import Block, Full
from attnres.verifying import verify
from attnres.watching import ConversionError, WatchedBlock, watch
from attnres.weights import EPS, NAME, check_eps, saved_reads, take

HANDLES = "attnres_handles"
"""Where a converted model keeps those of its hooks; not with the reads, so that these can be copied by themselves."""

SPREAD = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")
"""Classes that spread the parameters that there are over devices."""


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    residual: str = "block",
    layers_per_block: int | None = None,
    *,
    example: Mapping | tuple | Tensor | None = None,
    eps: float | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """Give a PreNorm model the residual "full" or "block", in place; returns the model.

    Its depth reads are then `model.attnres.reads`, one for each layer and the final one: parameters for the optimizer,
    and part of the state dict; `model.attnres.outputs` are for hooks (docs/attnres.md). A layer is a sublayer, so
    `layers_per_block` is usually even. `example` is an input to try the model on, as one argument, a tuple of them or
    keywords; transformers' language models bring their own. `eps` is that of the key norms: 1e-6, or what the `weights`
    were saved with. `weights` is a folder that `save_pretrained` made of a converted model, to take the reads' parameters
    from.

    Before anything is changed three forward passes, in training mode but without a trace, find the layers, check that
    they run one after the other, and that every state is the embedding plus the sum of the outputs so far. ValueError
    (ConversionError) naming the first layer where it is not, or the argument that cannot be. Code that torch.compile made
    before is compiled again.
    """
    check_is("model", model, nn.Module)
    _check_bare(model)
    _check_unconverted(model)
    _check_residual(residual, layers_per_block)
    if weights is not None and not isinstance(weights, str | Path):
        raise ValueError(f"weights must be a folder that save_pretrained made, not {weights!r}.")
    saved = saved_reads(Path(weights)) if weights is not None else {}
    if eps is None:
        eps = saved[EPS].view(torch.float64).item() if EPS in saved else 1e-6
    check_not_negative("eps", eps)
    args, kwargs = _inputs(model, example)
    blocks = _watched(model, args, kwargs, example is None)
    layers = sum(len(block.layers) for block in blocks)
    if residual == "block" and layers_per_block > layers:
        raise ValueError(
            f"layers_per_block must be at most {layers}, the model's layers, not {layers_per_block}."
        )
    size = layers_per_block or 1
    check_sequential(model, args, kwargs, blocks)
    verify(model, args, kwargs, blocks, size)
    reads = _residual(blocks, layers, layers_per_block, eps)
    # By its bits, for a whole number keeps its value when the model is cast.
    reads.register_buffer(
        EPS, torch.tensor(eps, dtype=torch.float64, device=_device(model)).view(torch.int64)
    )
    if weights is not None:
        take(reads, saved, weights)
    reads.register_load_state_dict_pre_hook(check_eps)
    model.add_module(NAME, reads)
    reads.outputs = depth_outputs(layers)
    handles = attach(model, blocks, size, reads.outputs, partial(AttentiveDepth.open, model))
    setattr(model, HANDLES, handles)
    _tell_compiler()
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place; returns the model, which computes what it did before. Its reads are gone.

    ValueError where there is nothing to undo.
    """
    if HANDLES not in getattr(model, "__dict__", {}):
        part = _converted_part(model) if isinstance(model, nn.Module) else None
        raise ValueError(
            f"The model was not converted{f', but its part {part} was' if part else ''}: pass the module that attnres.convert "
            "was given."
        )
    for handle in getattr(model, HANDLES):
        handle.remove()
    delattr(model, HANDLES)
    delattr(model, NAME)
    return model


def _converted_part(model: nn.Module) -> str | None:
    """The name of the submodule that was converted."""
    return next((name for name, part in model.named_modules() if HANDLES in vars(part)), None)


def _check_bare(model: nn.Module) -> None:
    """ValueError where reads would come too late: they have to be there when a model is compiled or spread over devices."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            "model must be the module itself, not what torch.compile made of it: convert the model, then compile it."
        )
    if isinstance(model, nn.Sequential):
        raise ValueError(
            "model must not be a Sequential itself, which would run the reads as one more of its layers: convert a module that "
            "holds it."
        )
    kinds = {kind.__name__ for part in model.modules() for kind in type(part).__mro__}
    for kind in SPREAD:
        if kind in kinds:
            raise ValueError(
                f"model must be the module itself, not under {kind}, which would leave the reads alone: convert the model, "
                "then wrap it."
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "model must have values in all its weights to be tried, and some are on the meta device: load or initialise them, "
            "then convert it."
        )


def _check_unconverted(model: nn.Module) -> None:
    if hasattr(model, NAME):
        raise ValueError(f"The model has {NAME!r} already: revert it before you convert it again.")
    if any(isinstance(hook, Enter) for part in model.modules() for hook in part._forward_pre_hooks.values()):
        raise ValueError(
            f"The model was converted already, by {_converted_part(model) or 'a module that holds it'}: revert that before you "
            "convert it again."
        )


def _check_residual(residual: object, layers_per_block: object) -> None:
    if residual not in ("full", "block"):
        raise ValueError(f'residual must be "full" or "block", not {residual!r}.')
    if residual == "full" and layers_per_block is not None:
        raise ValueError('layers_per_block is for residual "block" only, not for "full".')
    if residual == "block":
        check_count("layers_per_block", layers_per_block)


def _watched(model: nn.Module, args: tuple, kwargs: dict, is_own: bool) -> list[WatchedBlock]:
    """The blocks; ValueError where the model does not run on the example, or, `is_own`, on what it brings itself."""
    try:
        return watch(model, args, kwargs)
    except ConversionError:
        raise
    # Whatever somebody's model raises on an input that is not for it.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = "its own dummy_inputs: pass an example, an input to try it on"
        if not is_own:
            what = f"the example: {type(error).__name__}: {reason}"
        raise ValueError(f"The model does not run on {what}.") from error


def _inputs(model: nn.Module, example: Mapping | tuple | Tensor | None) -> tuple[tuple, dict]:
    if example is None:
        example = getattr(model, "dummy_inputs", None)
    if isinstance(example, Mapping):  # a tokenizer's batch, too
        return (), {name: _on_device(value, model) for name, value in example.items()}
    if isinstance(example, Tensor):
        example = (example,)
    if not isinstance(example, tuple):
        raise ValueError(
            "example must be an input to try the model on: a tensor, a tuple of arguments or a dict of keywords."
        )
    return tuple(_on_device(value, model) for value in example), {}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _on_device(value: object, model: nn.Module) -> object:
    return value.to(_device(model)) if isinstance(value, Tensor) else value


def _tell_compiler() -> None:
    """Code compiled for a model of this class without our hooks would run this one too: nothing tells them apart.

    So hooks shall, from now on, and what was compiled before is compiled again when it is next called.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def _residual(
    blocks: list[WatchedBlock], layers: int, layers_per_block: int | None, eps: float
) -> Full | Block:
    """The reads, on the device and in the dtype of the stream, which quantised or missing parameters may not have."""
    stream = blocks[0].output
    width = stream.shape[-1]
    made = (
        Full(width, layers, eps) if layers_per_block is None else Block(width, layers, layers_per_block, eps)
    )
    return made.to(stream.device, stream.dtype)
