"""How each process of a run is, as its own heartbeat and end marker say. Needs no torch."""

from collections import defaultdict
from pathlib import Path

from probes.careful import is_folder
from probes.life import Life
from probes.ranks import ONE, Ranks, rank_folder, ranks_in


class Statuses:
    """How the ranks of one attempt are, as their own heartbeats and end markers say."""

    def __init__(self, attempt: Path, ranks: Ranks, created: float):
        self._attempt, self._ranks, self._created = attempt, ranks, created
        self._lives: dict[int, Life] = {}

    def all(self) -> dict[int, tuple[str, str]]:
        """Of each rank "running", "finished", "stopped" or "missing", and why or since when."""
        if self._ranks.values == ONE:
            return {}
        there = set(ranks_in(self._attempt)) - {0}
        found = {0: self._life(0, self._attempt).state()}
        for rank in range(1, self._ranks.world):
            folder = rank_folder(self._attempt, rank)
            if rank in there and is_folder(folder):
                found[rank] = self._life(rank, folder).state()
            else:
                found[rank] = "missing", "no folder is here"
        return found

    def problems(self, status: str) -> list[str]:
        """A sentence for all ranks that have stopped for one reason, where the run itself has another `status`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, (how, why) in self.all().items():
            if rank and how in ("stopped", "missing") and how != status:
                groups[f"{how}: {why}" if why else how].append(rank)
        few = [(ranks, why) for why, ranks in list(groups.items())[:5]]
        return [f"{_named(ranks)} of {self._ranks.world} {_be(ranks)} {why}." for ranks, why in few]

    def _life(self, rank: int, folder: Path) -> Life:
        if rank not in self._lives:
            self._lives[rank] = Life(folder, self._created)
        return self._lives[rank]


def _named(ranks: list[int]) -> str:
    first = ", ".join(map(str, ranks[:5])) + (f" and {len(ranks) - 5} more" if len(ranks) > 5 else "")
    return f"Rank {first}" if len(ranks) == 1 else f"Ranks {first}"


def _be(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"
