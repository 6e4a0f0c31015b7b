"""Mirror a run's scalars to where people look already, from the writer's thread: training never waits.

Scalars go as they are, vectors over depth as their minimum, mean and maximum, matrices not at all.
"""

import importlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from probes.manifest import RunError
from probes.vocabulary import metric

log = logging.getLogger("depthscope")

# Called with a step and the values of that step by name.
Send = Callable[[int, dict[str, float]], object]
Rows = Iterable[tuple[str, int, np.ndarray]]  # metric, step, value


class Mirror:
    """`watch` the rows on their way to the writer; `close` when the last have gone.

    `given`: "tensorboard" (event files in the run's folder), "wandb" or "trackio" (the run that is active there), or a
    function of (step, values). Raises RunError, in one sentence, for anything else or what is not installed.
    """

    def __init__(self, given: str | Send, path: Path):
        self._close: Callable[[], object] = lambda: None
        self._failed = False
        if callable(given):
            self._send = given
        elif given in _KINDS:
            self._send, self._close = _KINDS[given](path)
        else:
            raise RunError(f"mirror is {given!r}: give {', '.join(_KINDS)} or a function of (step, values).")

    def watch(self, rows: Rows) -> Rows:
        """The same rows; when they have gone by, what they say is sent."""
        steps: dict[int, dict[str, float]] = {}
        for name, step, value in rows:
            steps.setdefault(step, {}).update(summary(name, np.asarray(value)))
            yield name, step, value
        for step, values in sorted(steps.items()):
            self._try(lambda step=step, values=values: self._send(step, values))

    def close(self) -> None:
        self._try(self._close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not self._failed:
                log.warning("depthscope could not mirror its scalars: %s. Recording goes on.", error)
            self._failed = True


def summary(name: str, value: np.ndarray) -> dict[str, float]:
    """What a row of a metric sends: a scalar itself, of a vector three numbers, of a matrix nothing."""
    axes = len(metric(name).axes)
    if axes == 0:
        return {name: float(value)}
    seen = value[~np.isnan(value)]
    if axes > 1 or not seen.size:
        return {}
    return {f"{name}/{kind}": float(getattr(np, kind)(seen)) for kind in ("min", "mean", "max")}


# Each gives the function that sends and the one that closes.


def _tensorboard(path: Path) -> tuple[Send, Callable[[], object]]:
    _installed("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: list[SummaryWriter] = []

    def send(step: int, values: dict[str, float]) -> None:
        if not writer:  # the folder is there by now
            writer.append(SummaryWriter(path / "tensorboard"))
        for name, value in values.items():
            writer[0].add_scalar(name, value, step)

    return send, lambda: [each.close() for each in writer]


def _wandb(path: Path) -> tuple[Send, Callable[[], object]]:
    run = _active("wandb", _installed("wandb").run)
    # Its own steps belong to whoever calls wandb.log.
    run.define_metric("depthscope/*", step_metric="depthscope/step")
    return lambda step, values: run.log(_prefixed({"step": step} | values)), lambda: None


def _trackio(path: Path) -> tuple[Send, Callable[[], object]]:
    # The active run is known to this thread alone.
    run = _active("trackio", _installed("trackio").context_vars.current_run.get())
    return lambda step, values: run.log(_prefixed(values), step=step), lambda: None


_KINDS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _prefixed(values: dict[str, float]) -> dict[str, float]:
    return {f"depthscope/{name}": value for name, value in values.items()}


def _installed(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(
            f"mirror={name!r} needs a package that is not here ({error}): pip install {name}."
        ) from None


def _active(name: str, run):
    if run is None:
        raise RunError(
            f"mirror={name!r} adds to the run that is active there, and none is: call {name}.init first."
        )
    return run
