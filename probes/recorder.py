"""A run being recorded: the recorder owns the taps, knows the step, and hands each recorded step to the writer."""

import logging
import math
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from probes.clock import Clock, Moment
from probes.edges import EDGE_METRICS
from probes.ending import Ending, describe, finishing
from probes.faults import Faults
from probes.flush import start_copy
from probes.following import Decode, Following
from probes.joint import Joint
from probes.manifest import Manifest
from probes.mirrors import Mirror
from probes.samples import Samples
from probes.scalars import Scalars
from probes.scaling import LossScale
from probes.schedule import Schedule
from probes.selfcheck import SelfCheck
from probes.taps import MATRICES, OFF, VECTORS
from probes.together import Together
from probes.vocabulary import GRADIENTS, METRICS
from probes.watched import Part, Watch
from probes.writer import RunWriter

log = logging.getLogger("depthscope")


class Recorder:
    """A run being recorded. Use as a context manager, or let it close at exit."""

    def __init__(
        self,
        parts: Sequence[Part],
        writer: RunWriter,
        manifest: Manifest,
        optimizers: list[torch.optim.Optimizer],
        scale: LossScale,
        faults: Faults,
        seconds: float,
        mirror: Mirror | None,
        together: Together | None = None,
    ):
        self._mirror = mirror
        self._following: Following | None = None
        self._writer, self._manifest, self._optimizers = writer, manifest, optimizers
        self._scale, self._faults = scale, faults
        self._clock = Clock(optimizers, manifest.step, attempts=together is not None)
        faults.step = lambda: self._step
        writer.missing = faults.missing
        self._asked = False
        self._retry = OFF  # a look was in vain, for the update was skipped on the device
        self._closed = False
        # What is told is of the whole model, of which this process may have one stage.
        whole = parts[0].sites if together is None else together.sites
        self._selfcheck = SelfCheck(whole)
        self._samples = Samples(whole, faults, self._selfcheck)
        self._owed = False  # the writer waits to hear that the recorded step is complete
        self._process = os.getpid()
        self._scalars = Scalars()
        self._joint = (
            None
            if together is None
            else Joint(together, self._clock, scale, faults, self._scalars, writer, mirror, self._told)
        )
        self._stepped_at = time.perf_counter()
        self._began = self._stepped_at - seconds  # of a clock that nobody sets, as if there had been no pause
        senders = 1 if together is None else together.merging.senders
        self._watch = Watch(parts, faults, scale, self._clock, together is not None, senders)
        self._watch.mode = self._mode(manifest.step)
        self._hooks = [
            hook
            for optimizer in optimizers
            for hook in (
                optimizer.register_step_pre_hook(self._before_update),
                optimizer.register_step_post_hook(lambda it, *_: self._after_update(it)),
            )
        ]
        self._ending = Ending(self.close, early=writer.uploads)

    # What a training script calls

    def log(self, **scalars) -> None:
        """Record scalars (numbers or one-element tensors) for the latest training forward. Never waits."""
        if self._closed:
            return
        self._scalars.log(scalars, self._latest)

    def now(self) -> None:
        """Record the next training step with matrices, whatever the schedule says."""
        if self._closed:
            return
        if self._watch.seen:
            self._asked = True
        else:
            self._watch.mode = MATRICES

    def step(self) -> None:
        """An optimizer step is complete. The optimizer's hook calls it; call it yourself without one."""
        if self._closed:
            return
        now = time.perf_counter()
        with self._faults.guard(*METRICS):
            if self._watch.mode != OFF and (self._watch.seen or self._joint is not None):
                self._keep_own(now)
                if not self._optimizers:
                    self._scale.unknown = self._watch.half and not self._scale.given
                if self._joint is None:
                    taps = self._watch.first.taps
                    self._put(self._measured(), taps.counts(), self._samples.of(taps, self._step))
                else:  # with data or without: the others wait for the sums of this process
                    self._joint.put(self._watch)
                    self._put()
                self._owed = True
            elif self._owed or self._scalars.due(now):
                self._put()
                self._owed = False
        if self._watch.mode != OFF:
            self._watch.begin(self._selfcheck)
            self._scale.reset()
            self._faults.reset()
        self._clock.advance()
        self._stepped_at = now
        self._watch.advance()
        retry, self._retry = self._retry, OFF
        self._watch.mode = max(self._mode(self._step), retry)
        if self._following is not None:
            self._following.begin(self._step)
            if not self._optimizers:
                self._following.take()  # nobody tells when a compiled model is updated next

    def close(self, status: str = "finished", reason: str = "") -> None:
        """Take all hooks off, seal what is left and mark the end. Closing twice does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        with finishing():
            self._close(status, reason)

    def _close(self, status: str, reason: str) -> None:
        self._closed = True
        if not self._optimizers and self._step == self._manifest.step and self._watch.seen:
            log.warning(
                "depthscope saw no optimizer step, so nothing but logged scalars was recorded: "
                "pass optimizer= to probes.record, or call recorder.step() after each update."
            )
        self._watch.detach()
        if self._following is not None:
            self._following.detach()
        for hook in self._hooks:
            hook.remove()
        self._ending.release()
        try:
            self._put()
            if self._joint is not None:
                self._watch.mode = OFF
                self._joint.put_last(self._watch)
        finally:
            if self._joint is not None and not self._joint.close(status):
                self._writer.lose(self._step, "the other processes did not answer before the end")
            self._writer.close(status, reason)
            if self._mirror is not None:
                self._mirror.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.close("stopped", describe(error))

    @property
    def nbytes(self) -> int:
        """Memory held on the model's device between steps, in bytes."""
        return self._watch.nbytes

    # One step

    def _follow(self, steps: Schedule, decode: Decode | None) -> None:
        """Take a snapshot of two sequences at each of `steps`."""
        clock, part = self._clock, self._watch.first.part
        self._following = Following(
            part.sites, steps, decode, part.masks, self._faults, self._writer, lambda: clock.now
        )
        # Where a forward takes all processes, all follow their sequences, and rank 0 alone tells.
        self._following.silent = self._joint is not None and self._writer.rank > 0
        self._following.begin(self._step)

    @property
    def _step(self) -> int:
        return self._clock.step

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._clock.again(optimizer):
            self.step()  # the other optimizers stay out of that one
        if self._following is not None:
            self._following.take()
        if self._watch.mode == OFF or not self._watch.seen:
            return
        if kwargs.get("closure") is not None or args[1:2] not in ((), (None,)):
            return  # its backward pass is still to come, perhaps the last of several
        with self._faults.guard("clip_factor"):
            self._watch.take(optimizer, self._scale.at_step(optimizer))
        self._watch.close()

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._clock.stepped(optimizer):
            self.step()

    def _mode(self, step: int) -> int:
        asked, self._asked = self._asked, False
        if asked or self._manifest.matrices(step):
            return MATRICES
        return VECTORS if self._manifest.vectors(step) else OFF

    @property
    def _latest(self) -> Moment:
        """The step of the latest training forward."""
        return self._clock.now if self._watch.seen else self._clock.before

    def _keep_own(self, now: float) -> None:
        """Host-side scalars of a recorded step."""
        scalars = {"step_time": now - self._stepped_at, "wall_time": now - self._began}
        # Taps inside a compiled graph are not timed.
        scalars["probe_time"] = self._watch.seconds or math.nan
        if self._optimizers:
            scalars["lr"] = self._optimizers[0].param_groups[0]["lr"]
        self._scalars.add(scalars, self._latest)

    def _measured(self) -> dict[str, torch.Tensor]:
        """The metrics of this step, gradients unscaled; without those that failed or cannot be known."""
        known = self._scale.known()
        metrics = self._watch.first.measured(self._clock.now.attempt)
        if self._scale.value is not None:
            scaled = {name for name in metrics if name.endswith("_grad_rms")} | set(EDGE_METRICS)
            metrics |= {name: metrics[name] / self._scale.value for name in scaled & set(metrics)}
        if self._scale.given or self._clock.vain() is not None:
            skipped = self._watch.skipped
            metrics["skipped"] = torch.zeros(()) if skipped is None else skipped
        left_out = self._scalars.logged | self._faults.now | (set() if known else set(GRADIENTS))
        return {name: value for name, value in metrics.items() if name not in left_out}

    def _put(
        self, metrics: dict | None = None, counts: dict | None = None, sampled: dict | None = None
    ) -> None:
        """Hand this step's `metrics` and all pending scalars over; `counts` say what was observed, and `sampled` is
        the sample."""
        if self._joint is not None and self._writer.rank:
            if not self._joint.keeps_scalars:
                self._scalars.take()  # what was logged here is not of all
            return
        now, mode, metrics, counts = self._clock.now, self._watch.mode, metrics or {}, counts or {}
        sampled = sampled or {}
        vain = self._clock.vain()
        pending = self._scalars.take()
        logged = {
            (name, "logged", i): v for i, (name, _, v) in enumerate(pending) if isinstance(v, torch.Tensor)
        }
        moments = {now, *(moment for _, moment, _ in pending)}
        skips = {("skips", m.attempt): m.skips for m in moments if m.skips is not None}
        skips |= {} if vain is None else {("vain",): vain}
        seen = {("count", name): count for name, count in counts.items()}
        parts = {("sample", name): part for name, part in sampled.items()}
        try:
            fetch = start_copy(logged | metrics | skips | seen | parts)
        except Exception as error:
            self._faults.caught(error, *metrics, *(name for name, _, _ in pending))
            return

        def rows():
            self._samples.taken_up += bool(sampled)
            values = fetch()
            seen = {name: values["count", name] for name in counts}
            lost = int(values.get(("vain",), 0))

            def step_of(moment: Moment) -> int:
                return moment.attempt - int(values.get(("skips", moment.attempt), 0))

            self._clock.learn(now.attempt - step_of(now) + lost)
            for i, (name, moment, value) in enumerate(pending):
                yield name, step_of(moment), values.get((name, "logged", i), value)
            if lost and metrics:
                # The gradients were not finite. What can be seen again will be, as soon as this is known.
                self._retry = mode
                yield "skipped", step_of(now), np.float32(1)
                return
            kept = {name: values["sample", name] for name in sampled}
            yield from self._told(step_of(now), {name: values[name] for name in metrics}, seen, kept)

        # Rows of this very step may still be logged until the next forward.
        fetch_rows = rows if self._mirror is None else lambda: self._mirror.watch(rows())
        taken = self._writer.put(fetch_rows, complete=lambda: self._complete(now.attempt))
        self._samples.handed += taken and bool(sampled)

    def _complete(self, attempt: int) -> int:
        """The last step of which no more rows will come, when `attempt` has begun."""
        if self._joint is not None:
            attempt = int(min(attempt, self._joint.settled + 1))
        return self._clock.known_at(attempt) - 1

    def _told(self, step: int, values: dict, seen: dict, kept: dict):
        """The rows of one recorded step, when its numbers are on the host."""
        self._selfcheck.finite(step, values, seen)
        self._selfcheck.identity(values.get("identity_error"), kept.get("about"))
        self._selfcheck.reads(values.get("read_error"), values.get("depth_weight"))
        for name, value in values.items():
            # A metric nobody observed is absent, not a row of blanks.
            if name not in seen or seen[name].any():
                yield name, step, value
        self._selfcheck.rows(seen)
        for name, value in self._samples.solved(kept):
            yield name, step, value
