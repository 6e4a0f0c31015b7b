"""Gaps: steps of a run that are missing, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probes.attempts import Attempt
from probes.careful import printable
from probes.lost import MOST_GAPS
from probes.vocabulary import MOST_STEP


@dataclass(frozen=True)
class Gap:
    """Rows of the steps `first` to `last`, both included, are missing because of `cause`, a clause."""

    first: int
    last: int
    cause: str

    def __str__(self) -> str:
        return f"Steps {self.first} to {self.last} are missing: {self.cause}."


def gaps_of(attempts: Sequence[Attempt]) -> list[Gap]:
    """Every gap of a run, by step. Rows that a later attempt hides are not missed."""
    found = []
    for attempt in attempts:
        limit = MOST_STEP + 1 if attempt.hidden_from is None else attempt.hidden_from
        known = [*_broken(attempt), *_let_go(attempt), *vanished(attempt)]
        sealed = [last for _, _, last in attempt.sealed.values()]
        last = max([attempt.step - 1, *sealed, *(gap.last for gap in known)])
        for gap in (*known, *_after(attempt, last)):
            if attempt.step <= gap.first < limit:
                found.append(Gap(gap.first, min(gap.last, limit - 1), gap.cause))
    return sorted(found, key=lambda gap: (gap.first, gap.last))


def _broken(attempt: Attempt) -> Iterator[Gap]:
    """Shards that cannot be trusted, here or put aside."""
    for name, (first, last, why) in attempt.broken.items():
        yield Gap(first, last, f"shard {name} {why}")
    for name, (first, last) in attempt.quarantined.items():
        yield Gap(first, last, f"shard {name} was damaged and is in quarantine")


def _let_go(attempt: Attempt) -> Iterator[Gap]:
    """What the writer says it could not write."""
    told = attempt.told.get("gaps")
    for entry in told[:MOST_GAPS] if isinstance(told, list) else ():
        match entry:
            case {"first": int(first), "last": int(last), "cause": str(cause)} if first <= last <= MOST_STEP:
                yield Gap(first, last, printable(cause))


def vanished(attempt: Attempt) -> Iterator[Gap]:
    """Shards that were sealed and are not there: they are numbered from 0 on."""
    sound = list(attempt.sealed.values())
    if any(number is None for number, _, _ in sound):
        return  # of a format without numbers, or joined
    count = attempt.told.get("shards")
    if type(count) is int and count > len(sound):
        sound.append((count, attempt.received + 1, attempt.received + 1))
    lost = [steps[:2] for steps in (*attempt.broken.values(), *attempt.quarantined.values())]
    before, last = -1, attempt.step - 1
    for number, first, until in sorted(sound):
        begin, stop = sorted((last + 1, first - 1))
        known = sum(begin <= steps[1] and steps[0] <= stop for steps in lost)
        if number - before - 1 > known:
            yield Gap(begin, stop, "what was sealed there is gone from the folder")
        before, last = number, max(last, until)


def _after(attempt: Attempt, last: int) -> Iterator[Gap]:
    """What came after step `last`: received but never sealed, or due before a later attempt began."""
    status, reason = attempt.ended
    if attempt.hidden_from is None:
        if status != "running" and attempt.received > last:  # the run's status says how it ended
            yield Gap(last + 1, attempt.received, "the recording ended before they were sealed")
        return
    how = f" (it had stopped: {reason})" if reason else ""
    end, due = attempt.hidden_from - 1, attempt.manifest.vectors.next(last)
    if last < end and attempt.received > last:
        yield Gap(last + 1, end, f"the recording ended before they were sealed{how}")
    elif due is not None and due <= end:
        yield Gap(last + 1, end, f"nobody recorded until the run was continued{how}")
