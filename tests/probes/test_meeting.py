"""Processes that meet to record: those that are started again do not hear what was said to those of before."""

import threading
import time

import pytest
import torch.distributed as dist

from benchmarks import long_run
from probes import processes
from probes.manifest import RunError
from probes.processes import Meeting
from probes.ranks import LOCAL


@pytest.fixture
def again(monkeypatch):
    """Two ranks, each time new to a store that stays, as torchrun's does with --max-restarts. What each was told."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def meet(attempt: int, steps: tuple[int, int], fails: bool = False) -> dict[int, object]:
        found = {}

        def one(meeting: Meeting) -> None:
            try:
                with meeting:
                    if fails:
                        raise RunError("no layers are found")
                    step = steps[meeting.rank]
                    found[meeting.rank] = meeting.begin(
                        "run", long_run.layout(2), [], step, lambda _: (attempt, 0.0)
                    ).attempt
            except RunError as error:
                found[meeting.rank] = str(error)

        threads = []
        for rank in (1, 0):  # rank 0, which answers, comes last
            monkeypatch.setattr(processes, "_meetings", 0)
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            threads.append(threading.Thread(target=one, args=(Meeting(LOCAL),)))
            threads[-1].start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(20)
        return found

    return meet


def test_processes_that_are_started_again_hear_what_is_said_to_them(again):
    assert again(0, (0, 0)) == {0: 0, 1: 0}
    assert again(1, (40, 40)) == {0: 1, 1: 1}
    refused = again(2, (40, 60))
    assert all("goes on at another step" in each for each in refused.values()) and len(refused) == 2
    assert again(2, (60, 60)) == {0: 2, 1: 2}
    assert again(3, (60, 60), fails=True) == dict.fromkeys((0, 1), "no layers are found")
    assert again(3, (80, 80)) == {0: 3, 1: 3}
