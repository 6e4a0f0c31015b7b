"""The processes that train one model: they meet when a recording begins, and agree on it or are refused together.

They meet over torch.distributed's store, which waits no longer than it is told to, and get a group of their own on the
host: a collective of ours cannot come between those of the training, on its device or in its order.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from probes.layout import Layout
from probes.manifest import RunError
from probes.parallel import is_parallel
from probes.ranks import LOCAL, MERGED, ONE
from probes.stages import judge

log = logging.getLogger("depthscope")

WAIT = 600.0  # seconds that processes wait for one another when a recording begins
_SAY = 10.0  # after so many it is said
_TOGETHER = timedelta(minutes=30)  # how long a sum may take: as long as torch's own collectives wait

_meetings = 0


@dataclass(frozen=True)
class Agreed:
    """What the processes agreed on: the attempt to write, and when it was begun. `group` sums on the host, None where values are
    not merged. `stages` are those of a pipeline in order, in JSON, and `holds` the numbers of those that each rank has."""

    rank: int
    world: int
    values: str
    attempt: int
    created: float
    group: object | None
    stages: tuple[dict, ...] = ()
    holds: tuple[tuple[int, ...], ...] = ()

    @property
    def teams(self) -> list[list[int]]:
        """Ranks that hold the whole model together, in the order of their ranks; each by itself where there are no stages."""
        if not self.stages:
            return [[rank] for rank in range(self.world)]
        alike = [
            [rank for rank, held in enumerate(self.holds) if held == each] for each in sorted(set(self.holds))
        ]
        return [list(team) for team in zip(*alike, strict=True)]

    @property
    def first(self) -> int:
        """The first of the ranks that hold what this one does."""
        return self.holds.index(self.holds[self.rank]) if self.stages else 0

    @property
    def speaker(self) -> int:
        """The rank that knows the loss."""
        last = len(self.stages) - 1
        return next((rank for rank, held in enumerate(self.holds) if last in held), 0)


def meet(ranks: str, modules: Sequence[nn.Module]) -> "Meeting | None":
    """A meeting of all processes, None where this one records by itself. Of a pipeline, `modules` are the stages of this one.
    Raises RunError for other words than there are, and for a model that takes all processes where one records."""
    if ranks not in (MERGED, LOCAL, ONE):
        raise RunError(
            f"ranks is {ranks!r}: give {MERGED!r} (values of all processes together), {LOCAL!r} (each process its own) or "
            f"{ONE!r} (only this process records)."
        )
    if len(modules) > 1 and ranks != MERGED:
        raise RunError(
            f"ranks={ranks!r} records one stage of a pipeline in each process, and this one has {len(modules)}: leave it out."
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == len(modules) == 1:
        return None
    if ranks == ONE:
        # A forward of it, as to find layers or to follow tokens, would wait for the others for ever.
        if any(isinstance(module, nn.Module) and is_parallel(module) for module in modules):
            raise RunError(
                f"Of this model each process holds a part, so that one alone cannot record it: call probes.record on every "
                f"process, with ranks={LOCAL!r} for values of each alone."
            )
        return None
    return Meeting(ranks)


class Meeting:
    """One call of `probes.record` on every process. Leave it with `begin`, or by an exception, which refuses all."""

    def __init__(self, values: str):
        global _meetings
        _meetings += 1
        self.values = values
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store = dist.PrefixStore(f"depthscope/{_meetings}", dist.distributed_c10d._get_default_store())
        self._told = False

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and not self._told:
            self._tell({"error": str(error)})
            if self.rank == 0:
                self._answer({"error": str(error)})
        # The store of torchrun outlives processes that it starts again, and they are not to hear what was said to these.
        with contextlib.suppress(Exception):  # it may be gone
            if self._store.add("left", 1) == self.world:
                for key in ("answer", "left", *(f"rank {rank}" for rank in range(self.world))):
                    self._store.delete_key(key)

    def begin(
        self,
        path: str,
        layout: Layout,
        schedules: object,
        step: int,
        claim: Callable[[list[dict]], tuple[int, float]],
        stages: Sequence[dict] = (),
    ) -> Agreed | None:
        """Rank 0 calls `claim` when all are there and agree, and tells what it gives: attempt and time. None where each
        process has a path of its own: then each records a run of its own. `stages` are what this one has of a pipeline; `claim`
        is called with those of all, none where there is no pipeline.

        Raises RunError on every process where one does not come, where they do not fit together, or where the
        claim fails.
        """
        mine = {
            "path": path,
            "layout": _digest(layout),
            "schedules": _digest(schedules),
            "step": step,
            "values": self.values,
            "stages": list(stages),
        }
        self._tell(mine)
        if self.rank == 0:
            try:
                answer = self._judge([self._hear(f"rank {rank}", WAIT) for rank in range(self.world)])
                answer["group"] = secrets.token_hex(8)  # its addresses are those of living processes alone
                if "apart" not in answer:
                    answer |= dict(zip(("attempt", "created"), claim(answer["stages"]), strict=True))
            except BaseException as error:
                self._answer({"error": str(error) or type(error).__name__})
                raise
            self._answer(answer)
        else:
            answer = self._hear("answer", 2 * WAIT)  # a claim may watch another's heartbeat
        if "error" in answer:
            raise RunError(answer["error"])
        if "apart" in answer:
            return None
        group = None
        if self.values == MERGED:
            group = dist.ProcessGroupGloo(
                dist.PrefixStore(f"sums {answer['group']}", self._store), self.rank, self.world, _TOGETHER
            )
        return Agreed(
            self.rank,
            self.world,
            self.values,
            answer["attempt"],
            answer["created"],
            group,
            tuple(answer["stages"]),
            tuple(map(tuple, answer["holds"])),
        )

    def _judge(self, told: list[dict]) -> dict:
        """What to answer, before the claim. Raises RunError."""
        for rank, each in enumerate(told):
            if "error" in each:
                raise RunError(f"{each['error']} (Rank {rank} says so.)" if rank else each["error"])
        paths = [each["path"] for each in told]
        if len(set(paths)) == self.world > 1:
            return {"apart": True}
        for what, sentence in _DIFFERENCES.items():
            if what == "layout" and (self.values == LOCAL or told[0]["stages"]):
                continue
            odd = [rank for rank, each in enumerate(told) if each[what] != told[0][what]]
            if odd:
                raise RunError(f"Rank {odd[0]} {sentence}")
        held = [each["stages"] for each in told]
        stages = [] if self.values == LOCAL else judge(held)
        return {"stages": stages, "holds": [[stage["index"] for stage in each] for each in held]}

    def _tell(self, what: dict) -> None:
        self._told = True
        self._store.set(f"rank {self.rank}", json.dumps(what))

    def _answer(self, what: dict) -> None:
        self._store.set("answer", json.dumps(what))

    def _hear(self, key: str, seconds: float) -> dict:
        """What somebody told. Raises RunError when nobody does."""
        began = time.monotonic()
        for wait in (min(_SAY, seconds), seconds):
            try:
                self._store.wait([key], timedelta(seconds=max(wait - (time.monotonic() - began), 0.01)))
                return json.loads(self._store.get(key))
            except dist.DistStoreError:
                who = "rank 0" if key == "answer" else key
                if wait < seconds:
                    log.warning(
                        "depthscope waits for %s to call probes.record too; ranks=%r is for one process that records alone.",
                        who,
                        ONE,
                    )
        raise RunError(
            f"Of {self.world} processes {who} did not call probes.record within {seconds:g} s: call it on every one of "
            f"them, with the same path, or give ranks={ONE!r} where this process alone records."
        )


_DIFFERENCES = {
    "path": "records at another path than rank 0: give one path to all, or to each its own.",
    "values": "was given other ranks= than rank 0: give the same to all.",
    "step": "goes on at another step than rank 0: load the same checkpoint on every process, or give the same resume= to all.",
    "schedules": "was given other steps to record than rank 0: give the same every= and matrices_every= to all.",
    "layout": "holds other layers than rank 0, as pipeline stages do: give probes.record the schedule that runs them, or "
    f"ranks={LOCAL!r}, by which each process records the layers that it holds.",
}


def _digest(value: object) -> str:
    if isinstance(value, Layout):
        value = value.to_json()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
