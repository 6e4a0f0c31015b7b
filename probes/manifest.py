"""The JSON files of a run: run.json (what it is), heartbeat.json (it lives), end.json (how it ended).

A resumed recording is an attempt of its own, in a folder of its own, whose attempt.json says what run.json says.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from probes import elsewhere
from probes.careful import printable, read_bytes
from probes.jsonfile import MOST_BYTES, parse_json
from probes.layout import Layout
from probes.ranks import Ranks
from probes.schedule import Schedule, schedule
from probes.vocabulary import FORMAT_VERSION, MOST_STEP

MANIFEST = "run.json"
ATTEMPT = "attempt.json"
HEARTBEAT = "heartbeat.json"
END = "end.json"
RANK_FOLDER = "rank-00000"

_MOST_RANGES, _MOST_PER_DECADE = 10_000, 10_000

# A writer beats every two seconds; one that has been silent this long and left no end marker has stopped.
HEARTBEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0


class RunError(Exception):
    """A run that cannot be opened or created; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What run.json says: layout of the model, configuration, schedules and versions, and the first `step`.

    `vectors` and `matrices` may be given as whatever `schedule` takes; an interval is the simplest.
    """

    layout: Layout
    created: float
    vectors: Schedule
    matrices: Schedule
    config: dict = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    versions: dict = field(default_factory=dict)
    format: int = FORMAT_VERSION
    step: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", schedule(self.vectors))
        object.__setattr__(self, "matrices", schedule(self.matrices))

    @property
    def every(self) -> int:
        """Steps between recorded vectors, beside those that ranges or log-spaced steps add."""
        return self.vectors.interval or 1

    @property
    def matrices_every(self) -> int:
        return self.matrices.interval or 1

    def to_json(self) -> dict:
        return {
            "format": self.format,
            "created": self.created,
            "step": self.step,
            "every": self.every,
            "matrices_every": self.matrices_every,
            "schedule": {"vectors": self.vectors.to_json(), "matrices": self.matrices.to_json()},
            "config": self.config,
            "tags": list(self.tags),
            "versions": self.versions,
            **({"ranks": self.ranks.to_json()} if self.ranks.world > 1 else {}),
            "layout": self.layout.to_json(),
        }

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST) -> "Manifest":
        """Raises RunError when run.json is missing, unreadable or from a newer depthscope."""
        where = printable(elsewhere.shown(folder))
        try:
            data = parse_json(read_bytes(folder / name, MOST_BYTES))
        except FileNotFoundError:
            raise RunError(
                f"There is no run at {where}: it has no {name}. Give the folder that probes.record wrote to."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(
                f"The run at {where} cannot be opened: its {name} is unreadable ({printable(error)})."
            ) from error
        try:
            if int(data["format"]) > FORMAT_VERSION:
                raise RunError(
                    f"The run at {where} has format {printable(int(data['format']), 20)}, newer than this depthscope reads "
                    f"({FORMAT_VERSION}): upgrade depthscope to open it."
                )
            datetime.fromtimestamp(data["created"], UTC)
            return cls(
                Layout.from_json(data["layout"]),
                float(data["created"]),
                *_schedules(data),
                dict(data.get("config") or {}),
                _tags(data.get("tags") or []),
                dict(data.get("versions") or {}),
                int(data["format"]),
                _step(data.get("step", 0)),
                Ranks.from_json(data.get("ranks")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            raise RunError(
                f"The run at {where} cannot be opened: its {name} is not a depthscope manifest ({printable(repr(error))})."
            ) from error


def _schedules(data: dict) -> list[Schedule]:
    """Those of vectors and of matrices; a run that says nothing but its intervals has no other part."""
    intervals = {"vectors": int(data["every"]), "matrices": int(data["matrices_every"])}
    told = dict(data.get("schedule") or {})
    found = [
        Schedule.from_json(told[kind]) if kind in told else schedule(interval)
        for kind, interval in intervals.items()
    ]
    for each in found:
        steps = [
            each.interval or 0,
            *(number for steps in each.ranges for number in (steps.stop, steps.step)),
        ]
        if max(steps) > MOST_STEP or len(steps) > _MOST_RANGES or (each.per_decade or 0) > _MOST_PER_DECADE:
            raise ValueError("a schedule of more steps than there are")
    return found


def _tags(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError("tags are a list of texts")
    return tuple(value)


def _step(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST_STEP:
        raise ValueError(f"step {value!r}")
    return value
