"""The sums of all processes, step by step, in a thread of its own: one packed collective on the host for each recorded step.

Training hands its sums over at the end of a step, where every process passes, and never waits: what waits for the others
is this thread. Steps with matrices take a second collective, and a sample of tokens that few processes send to rank 0.

Each collective says which step it is of. Where processes have not handed over the same steps (one could not keep up, or
was asked for a step of its own), those that not all have are let go, and the sums go on.
"""

import contextlib
import logging
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from probes.processes import Agreed

log = logging.getLogger("depthscope")

SENDERS = 4  # processes whose tokens are in a sample, at most
_MOST_BYTES = 256 << 20  # of sums that wait for the other processes

Sums = dict[str, np.ndarray]


@dataclass
class Step:
    """One recorded step of this process. `parts` are what adds up, by name: "vectors" [n], for a step with matrices
    "matrices" [m] too, and of a sender the "sample" [k]; `fetch` gives them, float64, when they are on the host. `then` is called
    with the sums of all (None: they could not be had, for the reason given), of rank 0."""

    number: int
    matrices: bool
    fetch: Callable[[], Sums]
    then: Callable[[Sums | None, str], None]
    nbytes: int = field(default=0)


class Merging:
    """`hand` a step over; `close` when there are no more."""

    def __init__(self, agreed: Agreed):
        self._agreed, self._group = agreed, agreed.group
        self.senders = min(SENDERS, agreed.world)
        self._handed = self._done = 0  # bytes, each counted by one thread
        self._broken = ""
        self._queue: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="depthscope merging", daemon=True)
        self._thread.start()

    @property
    def sends(self) -> bool:
        """Whether this process sends a sample."""
        return self._agreed.rank < self.senders

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
                    log.warning(
                        "depthscope cannot merge the processes' values any more, from step %d on: %s. Training goes on.",
                        step.number,
                        self._broken,
                    )
            self._done += step.nbytes
            with contextlib.suppress(Exception):  # it says itself what goes wrong with it
                step.then(found, why)

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
        if step.matrices:
            matrices = torch.from_numpy(parts["matrices"].copy())
            self._all_reduce(matrices)
            found["matrices"] = matrices.numpy()
            if "sample" in parts:
                found |= self._samples(torch.from_numpy(np.ascontiguousarray(parts["sample"], np.float32)))
        return found

    def _samples(self, mine: Tensor) -> Sums:
        """At rank 0 the samples of all senders, [senders, k]."""
        if self._agreed.rank:
            self._group.send([mine], 0, 0).wait()
            return {}
        others = [torch.empty_like(mine) for _ in range(self.senders - 1)]
        for rank, other in enumerate(others, 1):
            self._group.recv([other], rank, 0).wait()
        return {"samples": torch.stack([mine, *others]).numpy()}

    def _all_reduce(self, flat: Tensor) -> None:
        if flat.numel():
            self._group.allreduce([flat]).wait()


def packed(tensors: list[Tensor]) -> Tensor:
    """One flat tensor of all, float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def unpack(flat: np.ndarray, into: list[Tensor]) -> None:
    """Write what `packed` made of such tensors into these, on the host."""
    sizes = [tensor.numel() for tensor in into]
    if sum(sizes) != len(flat):
        raise ValueError(f"{len(flat)} numbers for {sum(sizes)} places")
    for tensor, part in zip(into, torch.from_numpy(np.array(flat)).split(sizes), strict=True):
        tensor.copy_((part if tensor.is_floating_point() else part.round()).reshape(tensor.shape))


def together(samples: np.ndarray, rows: int, elements: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sample of those of several processes: states and outputs [rows, n], tokens one after the other, and about
    [2, rows, 3] (sample.py). `samples` [senders, k] are each one's states, outputs and about, flat."""
    cut = np.split(samples, [rows * elements, 2 * rows * elements], axis=1)
    states, outputs = (each.reshape(len(samples), rows, elements) for each in cut[:2])
    abouts = cut[2].reshape(len(samples), 2, rows, 3)
    widths = abouts[:, :, :, 1]
    width = int(widths.max())
    tokens = abouts[:, :, :, 0].max((1, 2)).astype(int)
    used = [min(int(count) * width, elements) for count in tokens]
    about = abouts.max(0)
    about[:, :, 0] = abouts[:, :, :, 0].sum(0)
    states, outputs = (
        np.concatenate([each[i, :, :n] for i, n in enumerate(used)], axis=1) for each in (states, outputs)
    )
    if not states.size:
        states = outputs = np.full((rows, 1), np.nan, np.float32)
    return states, outputs, about


def _short(error: Exception) -> str:
    # Gloo begins with the place in its own source.
    text = re.sub(r"^\[[^]]*\] ", "", (str(error) or type(error).__name__).splitlines()[0])
    return text if len(text) < 120 else f"{text[:120]}…"
