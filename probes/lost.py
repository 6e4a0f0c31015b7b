"""What a writer had to let go: how often, and which steps."""

from dataclasses import dataclass

MOST_GAPS = 100
_MOST_CAUSES = 3  # that are told in a sentence


@dataclass
class _Steps:
    """How many steps one cause took, from the first to the last."""

    first: int
    last: int
    count: int = 0

    def __str__(self) -> str:
        some = f"from {self.first} to {self.last}" if self.last > self.first else f"{self.last}"
        return f"{self.count} steps, {some}" if self.count > 1 else f"step {some}"


class Lost:
    """Counts what was let go, and keeps its steps; two threads may add. Steps at most `near` apart are one gap."""

    def __init__(self, near: int):
        self.count = 0
        self._near = near
        self._added: list[tuple[int, int, str]] = []
        self._gaps: list[dict] = []
        self._causes: dict[str, _Steps] = {}

    def add(self, steps: list[int], cause: str, rows: int = 1) -> None:
        """Rows of these `steps`, in order, are lost because of `cause`."""
        self.count += rows
        if steps[0] < 0:
            return  # what was handed over belongs to no step
        self._added.append((steps[0], steps[-1], cause))
        if cause not in self._causes and len(self._causes) >= MOST_GAPS:
            cause = "other reasons"
        told = self._causes.setdefault(cause, _Steps(steps[0], -1))
        # A step is told once, though some of its rows may come, and go, later than others.
        told.count += len({step for step in steps if step > told.last})
        told.first, told.last = min(told.first, steps[0]), max(told.last, steps[-1])

    def gaps(self) -> list[dict]:
        """`first`, `last` and `cause` of each gap, as the heartbeat tells them."""
        while self._added:
            first, last, cause = self._added.pop(0)
            before = self._gaps[-1] if self._gaps else None
            near = before and before["cause"] == cause and first <= before["last"] + self._near
            if near or len(self._gaps) == MOST_GAPS:
                before["first"], before["last"] = min(before["first"], first), max(before["last"], last)
            else:
                self._gaps.append({"first": first, "last": last, "cause": cause})
        return list(self._gaps)

    def __str__(self) -> str:
        """ "57 steps, from 13 to 69 (the run could not be written (No space left on device))"; empty where nothing was lost."""
        found = list(self._causes.items())
        told = [f"{steps} ({cause})" for cause, steps in found[:_MOST_CAUSES]]
        if more := sum(steps.count for _, steps in found[_MOST_CAUSES:]):
            told.append(f"{more} more for other reasons")
        return "; ".join(told)
