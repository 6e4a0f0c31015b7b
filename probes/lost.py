"""What a writer had to let go: how often, and which steps."""

MOST_GAPS = 100


class Lost:
    """Counts what was let go, and keeps its steps; two threads may add. Steps at most `near` apart are one gap."""

    def __init__(self, near: int):
        self.count = 0
        self._near = near
        self._added: list[tuple[int, int, str]] = []
        self._gaps: list[dict] = []

    def add(self, step: int, cause: str, until: int | None = None, rows: int = 1) -> None:
        """Rows of `step`, or of `step` to `until`, are lost because of `cause`."""
        self.count += rows
        self._added.append((step, step if until is None else until, cause))

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
