"""Which steps are recorded: every N steps, ranges of steps, log-spaced steps, or several of these together.

    every=10                                 every 10 steps
    every=[range(100), 10]                   each of the first 100 steps, then every 10
    every=[range(2000, 2100), 100]           every 100, and each step from 2000 to 2099
    every=probes.log_spaced(20)              20 steps per factor of ten: 1, 2, … 10, 11, 13, 14, 16, …

Step 0, the model as it was initialised, is always recorded. This page crosses the disk and imports nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A function step -> bool, with `next` and a form in words and in JSON. `schedule` makes one."""

    interval: int | None = None
    ranges: tuple[range, ...] = ()
    per_decade: int | None = None

    def __call__(self, step: int) -> bool:
        return (
            step == 0
            or (self.interval is not None and step % self.interval == 0)
            or any(step in steps for steps in self.ranges)
            or (self.per_decade is not None and _after(step - 1, self.per_decade) == step)
        )

    def next(self, step: int) -> int | None:
        """The first recorded step after `step`; None if there is none."""
        if step < 0:
            return 0
        found = [each[_place(each, step)] for each in self.ranges if _place(each, step) < len(each)]
        if self.interval is not None:
            found.append((step // self.interval + 1) * self.interval)
        if self.per_decade is not None:
            found.append(_after(step, self.per_decade))
        return min(found, default=None)

    def count(self, steps: int) -> int:
        """How many of the steps 0 .. steps-1 are recorded."""
        return sum(map(self, range(steps)))

    def __str__(self) -> str:
        parts = [_words(steps) for steps in self.ranges]
        if self.interval is not None:
            parts.append("every step" if self.interval == 1 else f"every {self.interval} steps")
        if self.per_decade is not None:
            parts.append(f"{self.per_decade} steps per factor of ten")
        return " and ".join(parts)

    def to_json(self) -> dict:
        """What run.json says (docs/run-format.md): only the parts there are."""
        ranges = [[steps.start, steps.stop, steps.step] for steps in self.ranges]
        parts = {"every": self.interval, "ranges": ranges, "per_decade": self.per_decade}
        return {name: part for name, part in parts.items() if part}

    @classmethod
    def from_json(cls, data: dict) -> "Schedule":
        log = [log_spaced(data["per_decade"])] if "per_decade" in data else []
        interval = [data["every"]] if "every" in data else []
        return schedule([*interval, *(range(*steps) for steps in data.get("ranges", ())), *log])


# What `every=` takes.
Steps = int | range | Schedule | Sequence[int | range | Schedule]


def schedule(given: Steps) -> Schedule:
    """The schedule that `every=given` asks for: a whole number, a range, a Schedule, or a list of these.

    Raises ValueError, in one sentence, for anything else.
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, range):
        return Schedule(ranges=(_checked(given),))
    if isinstance(given, list | tuple):
        return _together([schedule(each) for each in given])
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return Schedule(given)
    raise ValueError("give a whole number of steps, 1 or more, a range of steps, or a list of both")


def log_spaced(per_decade: int = 20) -> Schedule:
    """The steps nearest to 10^(i / per_decade): dense at first, then as rare as training is long."""
    if not isinstance(per_decade, int) or isinstance(per_decade, bool) or per_decade < 1:
        raise ValueError(
            f"log_spaced({per_decade!r}): give a whole number of steps per factor of ten, 1 or more"
        )
    return Schedule(per_decade=per_decade)


def _together(parts: Sequence[Schedule]) -> Schedule:
    intervals = {part.interval for part in parts} - {None}
    decades = {part.per_decade for part in parts} - {None}
    if not parts:
        raise ValueError("the list is empty: give a whole number of steps, or ranges of steps")
    if len(intervals) > 1:  # whoever writes [10, 20, 50] may well mean these very steps
        raise ValueError("a list holds one interval at most; a single step s is range(s, s + 1)")
    if len(decades) > 1:
        raise ValueError("a list holds one log-spaced part at most")
    ranges = tuple(steps for part in parts for steps in part.ranges)
    return Schedule(next(iter(intervals), None), ranges, next(iter(decades), None))


def _checked(steps: range) -> range:
    if not steps or steps.step < 1 or steps.start < 0:
        raise ValueError(f"{steps} holds no steps to record: ranges go upwards from 0 or more")
    return steps


def _place(steps: range, step: int) -> int:
    """Where in `steps` the first one after `step` is; len(steps) or more if there is none."""
    return max(0, (step - steps.start) // steps.step + 1)


def _after(step: int, per_decade: int) -> int:
    """The first log-spaced step after `step`."""
    exponent = math.floor(per_decade * math.log10(max(step, 1)))
    while (found := round(10 ** (exponent / per_decade))) <= step:
        exponent += 1
    return found


def _words(steps: range) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if steps.step == 1:
        return f"steps {steps[0]}–{steps[-1]}"
    return f"every {steps.step} steps from {steps[0]} to {steps[-1]}"
