"""The JSON files of a run: run.json (what it is), heartbeat.json (it lives), end.json (how it ended)."""

import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from probes.layout import Layout
from probes.schedule import Schedule, schedule
from probes.vocabulary import FORMAT_VERSION

MANIFEST = "run.json"
HEARTBEAT = "heartbeat.json"
END = "end.json"
RANK_FOLDER = "rank-00000"

# A writer beats every two seconds; a run that has been silent this long and left no end marker has stopped.
HEARTBEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0


class RunError(Exception):
    """A run that cannot be opened or created; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What run.json says: layout of the model, configuration, schedules and versions.

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
            "every": self.every,
            "matrices_every": self.matrices_every,
            "schedule": {"vectors": self.vectors.to_json(), "matrices": self.matrices.to_json()},
            "config": self.config,
            "tags": list(self.tags),
            "versions": self.versions,
            "layout": self.layout.to_json(),
        }

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises RunError when run.json is missing, unreadable or from a newer depthscope."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"There is no run at {folder}: it has no {MANIFEST}. Give the folder that probes.record "
                "wrote to."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(
                f"The run at {folder} cannot be opened: its {MANIFEST} is unreadable ({error})."
            ) from error
        try:
            if data["format"] > FORMAT_VERSION:
                raise RunError(
                    f"The run at {folder} has format {data['format']}, newer than this depthscope reads "
                    f"({FORMAT_VERSION}): upgrade depthscope to open it."
                )
            datetime.fromtimestamp(data["created"], UTC)
            return cls(
                Layout.from_json(data["layout"]),
                float(data["created"]),
                *_schedules(data),
                dict(data.get("config") or {}),
                tuple(data.get("tags") or ()),
                dict(data.get("versions") or {}),
                int(data["format"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            raise RunError(
                f"The run at {folder} cannot be opened: its {MANIFEST} is not a depthscope manifest "
                f"({error!r})."
            ) from error


def _schedules(data: dict) -> list[Schedule]:
    """Those of vectors and of matrices; a run that says nothing but its intervals has no other part."""
    intervals = {"vectors": int(data["every"]), "matrices": int(data["matrices_every"])}
    told = dict(data.get("schedule") or {})
    return [
        Schedule.from_json(told[kind]) if kind in told else schedule(interval)
        for kind, interval in intervals.items()
    ]


def write_json(path: Path, data: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def beat(folder: Path, step: int, **trouble) -> None:
    """Say that the run lives: time, process and the last step written."""
    write_json(folder / HEARTBEAT, {"time": time.time(), "pid": os.getpid(), "step": step, **trouble})


def read_json(path: Path) -> dict | None:
    """The content of a small JSON object, or None when it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
