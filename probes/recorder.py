"""Record a training run: one line in the training script.

    recorder = probes.record(model, "runs/my-run", optimizer=optimizer)

The recorder owns the taps, knows the step, and hands each recorded step to the writer.
"""

import dataclasses
import json
import logging
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from probes.ending import Ending, describe
from probes.finding import find_sites
from probes.flush import start_copy
from probes.gradients import GradientNorms
from probes.identity import first_broken
from probes.manifest import Manifest, RunError
from probes.schedule import Schedule, Steps, schedule
from probes.sites import Sites
from probes.taps import MATRICES, OFF, VECTORS, Taps
from probes.version import version
from probes.vocabulary import metric
from probes.writer import RunWriter

log = logging.getLogger("depthscope")

# Logged scalars of unrecorded steps wait for company before they cross to the host.
_PENDING_SCALARS = 64
_PENDING_SECONDS = 1.0


_BEFORE = "Call probes.record before a compiled model first runs, and train the very module that was passed."


def record(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    every: Steps = 10,
    matrices_every: Steps = 100,
    config: dict | None = None,
    tags: Sequence[str] = (),
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> "Recorder":
    """Attach probes to `model` and record its training at `path`, a new folder.

    Call it before the first forward, also before torch.compile has run. Step s is the number of optimizer
    steps completed; vectors are recorded every `every` steps, matrices (and vectors with them) every
    `matrices_every`. Either may also be a range of steps, `probes.log_spaced()`, or a list of such parts, as
    `[range(100), 10]` for each of the first 100 steps and then every 10; step 0 is always recorded. Without an
    `optimizer` call `recorder.step()` after each update. `config` (JSON values) is stored beside the model's
    own configuration.

    The layers are found by themselves (`probes.describe` shows how). Where a model has several stacks of transformer
    blocks, `stack` names the one to record; where none is found, `layers` and `norms` are patterns over
    `named_modules()` for the sublayers, and for the modules that receive each layer's state and the final one. A number of `layers` is for a
    model that names its tensors itself with `probes.mark`.

    Gradients are recorded as autograd gives them: a loss scaled by a GradScaler gives scaled ones.

    Raises RunError: a run or other files at `path`, a model without recognisable layers, a bad interval.
    """
    vectors, matrices = schedule_of("every", every), schedule_of("matrices_every", matrices_every)
    sites = find_sites(model, stack, layers, norms)
    created = time.time()
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise RunError(
            f"A {type(optimizer).__name__} is not a torch.optim.Optimizer: leave `optimizer` out and call "
            "recorder.step() after each update."
        )
    try:
        described = _model_config(sites.root) | json.loads(json.dumps(dict(config or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RunError(
            f"config must hold plain JSON values (text, numbers, lists, dicts): {error}."
        ) from error
    tags = (tags,) if isinstance(tags, str) else tuple(map(str, tags))
    manifest = Manifest(sites.layout, created, vectors, matrices, described, tags, _versions(sites))
    return Recorder(sites, RunWriter(Path(path), manifest), manifest, optimizer)


class Recorder:
    """A run being recorded. Use as a context manager, or let it close at exit."""

    def __init__(
        self,
        sites: Sites,
        writer: RunWriter,
        manifest: Manifest,
        optimizer: torch.optim.Optimizer | None,
    ):
        self._writer, self._manifest, self._optimizer = writer, manifest, optimizer
        self._step = 0
        self._asked = False
        self._closed = False
        self._checked = self._identity_checked = False
        self._sites = sites
        self._owed = False  # the writer waits to hear that the recorded step is complete
        self._process = os.getpid()
        self._scalars: list[tuple[str, int, object]] = []
        self._logged: set[str] = set()  # names the script has logged itself
        self._put_at = self._stepped_at = time.perf_counter()
        self._model_name = type(sites.root).__name__
        self._taps = Taps(sites)
        self._gradients = GradientNorms(sites, lambda: self._taps.mode != OFF)
        self._taps.mode = self._mode(0)
        self._hooks = (
            [optimizer.register_step_post_hook(lambda *_: self.step())] if optimizer is not None else []
        )
        self._ending = Ending(self.close)

    # What a training script calls

    def log(self, **scalars) -> None:
        """Record scalars (numbers or one-element tensors) for the latest training forward. Never waits."""
        if self._closed:
            return
        for name in scalars:
            _check_name(name)
        self._logged.update(scalars)
        self._keep(scalars)

    def now(self) -> None:
        """Record the next training step with matrices, whatever the schedule says."""
        if self._closed:
            return
        if self._taps.seen:
            self._asked = True
        else:
            self._taps.mode = MATRICES

    def step(self) -> None:
        """An optimizer step is complete. The optimizer's hook calls it; call it yourself without one."""
        if self._closed:
            return
        now = time.perf_counter()
        if self._taps.mode != OFF and self._taps.seen:
            self._keep_own(now)
            self._put(self._measured(), self._taps.counts())
            self._owed = True
        elif self._owed or self._due(now):
            self._put()
            self._owed = False
        if self._taps.mode != OFF:
            if not self._taps.seen:
                self._say_unseen()
            self._taps.reset()
            self._gradients.reset()
        self._step += 1
        self._stepped_at = now
        self._taps.seen = False
        self._taps.mode = self._mode(self._step)

    def close(self, status: str = "finished", reason: str = "") -> None:
        """Take all hooks off, seal what is left and mark the end. Closing twice does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        if self._optimizer is None and self._step == 0 and self._taps.seen:
            log.warning(
                "depthscope saw no optimizer step, so nothing but logged scalars was recorded: "
                "pass optimizer= to probes.record, or call recorder.step() after each update."
            )
        self._taps.detach()
        self._gradients.detach()
        for hook in self._hooks:
            hook.remove()
        self._ending.release()
        self._put()
        self._writer.close(status, reason)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.close("stopped", describe(error))

    # One step

    def _mode(self, step: int) -> int:
        asked, self._asked = self._asked, False
        if asked or self._manifest.matrices(step):
            return MATRICES
        return VECTORS if self._manifest.vectors(step) else OFF

    def _due(self, now: float) -> bool:
        many = len(self._scalars) >= _PENDING_SCALARS
        return many or bool(self._scalars and now - self._put_at > _PENDING_SECONDS)

    def _keep(self, scalars: dict) -> None:
        """Hold scalars until the next hand-over; they belong to the latest training forward."""
        step = self._step if self._taps.seen else max(self._step - 1, 0)
        for name, value in scalars.items():
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise ValueError(
                        f"log({name}=…) takes a single real number, not a {value.dtype} tensor of {value.numel()}."
                    )
                # A copy: the tensor's memory may be reused before it is fetched.
                value = value.detach().reshape(()).clone()
            else:
                value = _number(name, value)
            self._scalars.append((name, step, value))

    def _keep_own(self, now: float) -> None:
        """Host-side scalars of a recorded step, but for those that the script logs itself."""
        scalars = {"step_time": now - self._stepped_at, "wall_time": time.time() - self._manifest.created}
        # Taps inside a compiled graph are not timed.
        scalars["probe_time"] = self._taps.seconds or math.nan
        if self._optimizer is not None:
            scalars["lr"] = self._optimizer.param_groups[0]["lr"]
        self._keep({name: value for name, value in scalars.items() if name not in self._logged})

    def _measured(self) -> dict[str, torch.Tensor]:
        metrics = self._taps.finish() | self._gradients.finish()
        return {name: value for name, value in metrics.items() if name not in self._logged}

    def _put(self, metrics: dict | None = None, counts: dict | None = None) -> None:
        """Hand this step's `metrics` and all pending scalars over; `counts` say what was observed."""
        step, metrics, counts = self._step, metrics or {}, counts or {}
        pending, self._scalars = self._scalars, []
        known = [(name, step, np.float32(v)) for name, step, v in pending if not isinstance(v, torch.Tensor)]
        logged = {(name, s, i): v for i, (name, s, v) in enumerate(pending) if isinstance(v, torch.Tensor)}
        fetch = start_copy(logged | metrics | {("count", name): count for name, count in counts.items()})

        def rows():
            values = fetch()
            seen = {name: values["count", name] for name in counts}
            yield from known
            yield from ((name, s, values[name, s, i]) for name, s, i in logged)
            self._check_identity(values.get("identity_error"))
            for name in metrics:
                # A metric nobody observed is absent, not a row of blanks.
                if name not in seen or seen[name].any():
                    yield name, step, values[name]
            self._check(seen)

        # Rows of this very step may still be logged until the next forward.
        self._writer.put(rows, complete=self._step - 1)
        self._put_at = time.perf_counter()

    # The first recorded step is checked: a tap that never fires would leave a blank nobody notices.

    def _check(self, seen: dict[str, np.ndarray]) -> None:
        """Say once which rows were not observed; runs in the writer's thread."""
        if self._checked or not seen:
            return
        self._checked = True
        layout = self._manifest.layout
        labels = {"hidden_rms": layout.states, "output_rms": layout.outputs}
        blank = {
            name: [label for label, n in zip(rows, seen[name], strict=True) if not n]
            for name, rows in labels.items()
        }
        if any(blank.values()):
            rows = "; ".join(f"{name}: {', '.join(missing)}" for name, missing in blank.items() if missing)
            log.warning("depthscope saw nothing of %s. These rows stay blank. %s", rows, _BEFORE)

    def _check_identity(self, errors: np.ndarray | None) -> None:
        """Say once where the stream of a plain residual does not add up; runs in the writer's thread."""
        if self._identity_checked or errors is None or not self._sites.is_plain:
            return
        self._identity_checked = True
        row = first_broken(errors, next(self._sites.root.parameters()).dtype)
        if row is not None:
            log.warning(
                "depthscope: the %s of %s is not the embedding plus the outputs before it (it differs by %.1e): the "
                "model mixes its layers otherwise. Outputs are recorded as the modules return them; "
                "`probes.describe(model)` shows which.",
                self._manifest.layout.states[row].replace("into", "state into"),
                self._model_name,
                errors[row],
            )

    def _say_unseen(self) -> None:
        if not self._checked:
            self._checked = True
            log.warning(
                "depthscope saw no forward of %s in training mode before the first optimizer step. %s",
                self._model_name,
                _BEFORE,
            )


def schedule_of(name: str, given: Steps) -> Schedule:
    """The schedule that `name=given` asks for. Raises RunError, in one sentence."""
    try:
        return schedule(given)
    except ValueError as error:
        raise RunError(f"{name} is {given!r}: {error}.") from None


def _check_name(name: str) -> None:
    if metric(name).axes or name.endswith(".step") or name.startswith("__"):
        raise ValueError(f"log({name}=…): this name is kept for depthscope's own; choose another.")


def _number(name: str, value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"log({name}=…) takes a number, not {value!r}.") from None


def _model_config(root: nn.Module) -> dict:
    """The model's own configuration, where it carries one; what JSON has no value for is written as text."""
    config = getattr(root, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, dict):
        return {}
    return json.loads(json.dumps(config, default=str, skipkeys=True), parse_constant=str)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions(sites: Sites) -> dict:
    parameter = next(sites.root.parameters())
    return {
        "depthscope": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in sites.root.parameters()),
    }
