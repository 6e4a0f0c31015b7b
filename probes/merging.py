"""The sums of all processes, step by step, in a thread of its own: one packed collective on the host for each recorded step.

Training hands its sums over at the end of a step, where every process passes, and never waits: what waits for the others
is this thread. Steps with matrices take a second collective, and a sample of tokens that few processes send to rank 0.

Each collective says which step it is of. Where processes have not handed over the same steps (one could not keep up, or
was asked for a step of its own), those that not all have are let go, and the sums go on.
"""

import contextlib
import functools
import logging
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from probes.processes import Agreed

log = logging.getLogger("depthscope")

END = 2**50  # the number of what is handed over when there are no more steps
SENDERS = 4  # processes whose tokens are in a sample, at most
_MOST_BYTES = 256 << 20  # of sums that wait for the other processes

Sums = dict[str, np.ndarray]


@dataclass
class Step:
    """One recorded step of this process. `parts` are what adds up, by name: "vectors" [n], for a step with matrices
    "matrices" [m] too, and of a sender the "sample" [k]; `fetch` gives them, float64, when they are on the host. `then` is called
    with the sums of all (None: they could not be had, for the reason given), of rank 0. In a pipeline the rank that knows the
    loss has "said" something too, bytes."""

    number: int
    matrices: bool
    fetch: Callable[[], Sums]
    then: Callable[[Sums | None, str], None]
    nbytes: int = field(default=0)


class Merging:
    """`hand` a step over; `close` when there are no more."""

    def __init__(self, agreed: Agreed):
        # Nobody else keeps the group: where it is let go its connections are closed, and the others need not wait.
        self._agreed, self._group = replace(agreed, group=None), agreed.group
        self._teams = agreed.teams[:SENDERS]
        self.senders = len(self._teams)
        self._handed = self._done = 0  # bytes, each counted by one thread
        self._broken = ""
        self._queue: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="depthscope merging", daemon=True)
        self._thread.start()

    @property
    def sends(self) -> bool:
        """Whether this process sends a sample."""
        return any(self._agreed.rank in team for team in self._teams)

    def hand(self, step: Step) -> None:
        if self._handed - self._done + step.nbytes > _MOST_BYTES:
            step.then(None, "the other processes could not keep up")
            return
        self._handed += step.nbytes
        self._queue.put(step)

    def close(self, patience: float) -> bool:
        """Wait for what was handed over; whether all of it was summed."""
        self._queue.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    # The thread

    def _work(self) -> None:
        while (step := self._queue.get()) is not None:
            found, why = None, self._broken
            if not self._broken:
                try:
                    found = self._sum(step)
                    why = "" if found is not None else "not all processes recorded it"
                except Exception as error:
                    why = self._broken = f"another process is gone or cannot be reached ({_short(error)})"
                    if step.number < END:
                        log.warning(
                            "depthscope cannot merge the processes' values any more, from step %d on: %s. Training goes on.",
                            step.number,
                            self._broken,
                        )
            self._done += step.nbytes
            with contextlib.suppress(Exception):  # it says itself what goes wrong with it
                step.then(found, why)
        self._group = None

    def _sum(self, step: Step) -> Sums | None:
        """The sums over all processes; None where not all of them have this step."""
        parts = step.fetch()
        head = 2 * step.number + step.matrices
        vectors = parts["vectors"]
        while True:
            flat = torch.zeros(self._agreed.world + len(vectors), dtype=torch.float64)
            flat[self._agreed.rank] = head
            flat[self._agreed.world :] = torch.from_numpy(vectors)
            self._all_reduce(flat)
            heads = flat[: self._agreed.world]
            if bool((heads == head).all()):
                break
            if head == heads.min():
                return None
        found = {"vectors": flat[self._agreed.world :].numpy()}
        if self._agreed.speaker:
            found["said"] = self._said(parts.get("said", np.zeros(0, np.uint8)))
        if step.matrices:
            matrices = torch.from_numpy(parts["matrices"].copy())
            self._all_reduce(matrices)
            found["matrices"] = matrices.numpy()
            if "sample" in parts:
                found |= self._samples(torch.from_numpy(np.ascontiguousarray(parts["sample"], np.float32)))
        return found

    def _samples(self, mine: Tensor) -> Sums:
        """At rank 0 the samples of all senders, [senders, k]: what a team has kept of one batch is one."""
        if self._agreed.rank:
            self._group.send([mine], 0, 0).wait()
            return {}
        samples = []
        for team in self._teams:
            parts = [mine if rank == 0 else self._from(rank, torch.empty_like(mine)) for rank in team]
            samples.append(functools.reduce(torch.fmax, parts))  # NaN where a stage has no rows
        return {"samples": torch.stack(samples).numpy()}

    def _said(self, mine: np.ndarray) -> np.ndarray:
        """At rank 0 what the rank says that knows the loss."""
        length, said = torch.tensor([len(mine)]), torch.from_numpy(mine)
        if self._agreed.rank == 0:
            speaker = self._agreed.speaker
            length = self._from(speaker, length)
            return self._from(speaker, torch.zeros(int(length), dtype=torch.uint8)).numpy()
        if self._agreed.rank == self._agreed.speaker:
            self._group.send([length], 0, 0).wait()
            if len(mine):
                self._group.send([said], 0, 0).wait()
        return mine

    def _from(self, rank: int, into: Tensor) -> Tensor:
        if into.numel():
            self._group.recv([into], rank, 0).wait()
        return into

    def _all_reduce(self, flat: Tensor) -> None:
        if flat.numel():
            self._group.allreduce([flat]).wait()


def _short(error: Exception) -> str:
    # Gloo begins with the place in its own source.
    text = re.sub(r"^\[[^]]*\] ", "", (str(error) or type(error).__name__).splitlines()[0])
    text = text.partition(". This is typically")[0]  # it guesses at the cause
    return text if len(text) < 120 else f"{text[:120]}…"
