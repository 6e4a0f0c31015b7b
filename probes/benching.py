"""Measure what recording costs: on the user's own model, batch and machine.

Recorded and unrecorded steps alternate in one run, in every order in turn, and a ratio is taken within a round, so
that what else the machine does falls on all alike.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from probes.cost import Cost
from probes.manifest import RunError
from probes.recorder import Recorder
from probes.recording import record, schedule_of
from probes.schedule import Steps
from probes.stopwatch import timed
from probes.target import arguments, said
from probes.unchanged import unchanged

_KINDS = ("unrecorded", "vectors", "matrices")
_ORDERS = tuple(itertools.permutations(_KINDS))
_WARM_UP = ("matrices", "vectors", "unrecorded") * 2  # the first three build the graphs of a compiled model
_CALLS = 1000  # of a hook, to time one


def bench(
    model: nn.Module,
    batch: object,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[object], Tensor] | None = None,
    every: Steps = 10,
    matrices_every: Steps = 100,
    compile: bool = False,
    pairs: int = 25,
    stack: str | Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> Cost:
    """Train `model` on `batch` for 3 × `pairs` steps and a few to warm up, and say what recording costs.

    `batch` is what one forward is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
    `loss` makes a scalar of the model's output; without one, the output's own `loss` is used where it has one, and
    else the mean square of the (first) output, which costs nearly the same. Without an `optimizer` AdamW with
    learning rate 0 is used. `every`, `matrices_every`, `stack`, `layers` and `norms` are what `probes.record` would be
    given. With `compile` the model is run through torch.compile, and all that the compiler remembers is forgotten
    afterwards.

    The model and the optimizer are left as they were (probes/unchanged.py).

    Raises RunError: a model that cannot be recorded, a step that fails, a bad schedule or number of pairs.
    """
    vectors, matrices = schedule_of("every", every), schedule_of("matrices_every", matrices_every)
    if not isinstance(pairs, int) or pairs < 1:
        raise RunError(f"pairs is {pairs!r}: give a whole number, 1 or more.")
    if not isinstance(model, nn.Module):
        raise RunError(
            f"A model of type {type(model).__name__} is not a torch.nn.Module: pass the model that is trained."
        )
    compiled = compile or _is_compiled(model)
    with unchanged(model, optimizer), tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        try:
            run = torch.compile(model) if compile else model
            step = _Step(run.train(), batch, loss or loss_of, optimizer or _adamw(model))
            seconds, hooks, per_call, held = _measured(
                model,
                step,
                pairs,
                path=Path(folder) / "run",
                stack=stack,
                layers=layers,
                norms=norms,
                example=batch,
            )
        finally:
            if compiled:  # a graph would remember hooks that are gone
                torch._dynamo.reset()
    # In a compiled model nothing is left of a module's hooks but a branch that was not taken.
    calls = sum(kind == "gradient" for kind, *_ in hooks) if compiled else len(hooks)
    return Cost(
        model=type(getattr(model, "_orig_mod", model)).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        model_bytes=sum(p.nbytes for p in model.parameters()),
        probe_bytes=held,
        machine=machine(_device(model)),
        compiled=compiled,
        every=vectors,
        matrices_every=matrices,
        seconds=seconds,
        hook_calls=calls + 1,  # and the optimizer's
        seconds_per_call=per_call,
    )


class _Step:
    """One training step."""

    def __init__(self, run: nn.Module, batch: object, loss: Callable, optimizer: torch.optim.Optimizer):
        self._run, self._loss, self.optimizer = run, loss, optimizer
        self._args, self._kwargs = arguments(batch)

    def __call__(self) -> None:
        try:
            self._loss(self._run(*self._args, **self._kwargs)).backward()
            self.optimizer.step()
        except RunError:
            raise
        except Exception as error:
            name = type(getattr(self._run, "_orig_mod", self._run)).__name__
            raise RunError(f"A training step of {name} failed: {said(error)}.") from error
        self.optimizer.zero_grad()


def _measured(model: nn.Module, step: _Step, pairs: int, **options) -> tuple:
    """Seconds of the steps by kind, the hooks, seconds of one of them, and the bytes that the probe holds."""
    kinds = [*_WARM_UP, *_rounds(pairs)]
    others = set(_hooks(model))
    options |= {"every": _steps("vectors", kinds), "matrices_every": _steps("matrices", kinds)}
    with record(model, optimizer=step.optimizer, **options) as recorder:
        times = timed([step] * len(kinds), _device(model))
        hooks = {key: hook for key, hook in _hooks(model).items() if key not in others}
        per_call = _seconds_per_hook(hooks, recorder)
        held = recorder.nbytes
    seconds = {
        kind: [
            t for t, each in zip(times[len(_WARM_UP) :], kinds[len(_WARM_UP) :], strict=True) if each == kind
        ]
        for kind in _KINDS
    }
    return seconds, hooks, per_call, held


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RunError(
            f"No parameter of {type(model).__name__} requires a gradient: there is no step to measure."
        )
    return torch.optim.AdamW(trained, lr=0.0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def loss_of(output: object) -> Tensor:
    """A scalar to train on: the output's own loss, or the mean square of its first tensor."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own.mean()
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise RunError(
            f"The model's output is of type {type(output).__name__}: give loss=, a function that makes a scalar of it."
        )
    return output if output.ndim == 0 else output.float().square().mean()


def machine(device: torch.device) -> str:
    """The device a step runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"cpu with {threads} thread{'s' * (threads > 1)}"


def _rounds(pairs: int) -> list[str]:
    """Each kind once a round. All orders take turns, for a step also feels what the one before it left behind."""
    return [kind for order in itertools.islice(itertools.cycle(_ORDERS), pairs) for kind in order]


def _steps(kind: str, kinds: list[str]) -> list[range]:
    """The steps that are of `kind`, as few ranges: the orders come round again."""
    start, period = len(_WARM_UP), len(_KINDS) * len(_ORDERS)
    first = [step for step, each in enumerate(kinds[: start + period]) if each == kind]
    return [range(s, s + 1) if s < start else range(s, len(kinds), period) for s in first]


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(model, OptimizedModule) or model._compiled_call_impl is not None


# The hooks of an unrecorded step: a call takes a microsecond, too little to be seen in the time of a step.


def _hooks(model: nn.Module) -> dict[tuple, tuple[object, Callable]]:
    """Every hook on a model's modules and parameters: (kind, owner's id, hook's id) -> (owner, hook)."""
    found = {}
    for module in model.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in getattr(module, kind).items():
                found[kind, id(module), key] = module, hook
    for p in model.parameters():
        for key, hook in (p._post_accumulate_grad_hooks or {}).items():
            found["gradient", id(p), key] = p, hook
    return found


def _seconds_per_hook(hooks: dict[tuple, tuple[object, Callable]], recorder: Recorder) -> float:
    """Mean time of a call of ours while nothing is recorded.

    A module's hook is called as PyTorch calls it, by a module that does nothing else.
    """
    x = torch.zeros(1)
    bare = _seconds_per_call(nn.Identity(), x)
    times = [_seconds_per_call(recorder.step)]
    for (kind, _, key), (owner, hook) in hooks.items():
        if kind == "gradient":
            times.append(_seconds_per_call(hook, owner))
        else:
            carrier = nn.Identity()
            getattr(carrier, kind)[key] = hook
            if key in getattr(owner, f"{kind}_with_kwargs"):
                getattr(carrier, f"{kind}_with_kwargs")[key] = True
            times.append(_seconds_per_call(carrier, x) - bare)
    return sum(times) / len(times)


def _seconds_per_call(function: Callable, *args) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        function(*args)
    return (time.perf_counter() - started) / _CALLS
