"""Is a recording alive? What its heartbeat and its end marker say, whatever the clocks say."""

import contextlib
import hashlib
import logging
import os
import platform
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from probes import manifest as files
from probes.careful import printable, read_bytes
from probes.jsonfile import MOST_SIGN, read_json, write_json

log = logging.getLogger("depthscope")

WATCH_SECONDS = 10.0  # several beats, and a network's file cache


class Life:
    """How the recording in `folder` is; it was begun at `created` [seconds since 1970].

    A heartbeat counts as fresh by its time, or because it was seen to change a moment ago: then the two clocks
    need not agree.
    """

    def __init__(self, folder: Path, created: float):
        self._folder, self._created = folder, created
        self._last: object = None
        self._moved = -float("inf")

    def state(self) -> tuple[str, str]:
        """ "running", "finished" or "stopped", and why or since when."""
        return self.look()[0]

    @property
    def seen(self) -> datetime:
        """Time of the end marker, else of the last heartbeat, else of creation."""
        return self._time(read_json(self._folder / files.END), read_json(self._folder / files.HEARTBEAT))

    def look(self) -> tuple[tuple[str, str], dict]:
        """The state, and what the recording said last: the end marker, else the heartbeat."""
        end = read_json(self._folder / files.END)
        if end is not None:
            status = "finished" if end.get("status") == "finished" else "stopped"
            return (status, printable(end.get("reason") or "")), end
        beat = read_json(self._folder / files.HEARTBEAT)
        seen = self._time(beat)
        if self._moves() or abs(time.time() - seen.timestamp()) <= files.SILENT_SECONDS:
            return ("running", ""), beat or {}
        silent = f"no sign of life since {seen:%Y-%m-%d %H:%M:%S} UTC, and no end marker"
        return ("stopped", silent), beat or {}

    def _time(self, *signs: dict | None) -> datetime:
        for sign in signs:
            # A damaged file may hold anything.
            with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
                return datetime.fromtimestamp((sign or {}).get("time"), UTC)
        return datetime.fromtimestamp(self._created, UTC)

    def _moves(self) -> bool:
        """Whether the heartbeat changed, before our eyes, within the time of silence."""
        beat, now = _last_beat(self._folder), time.monotonic()
        if self._last not in (None, beat):
            self._moved = now
        self._last = beat
        return now - self._moved < files.SILENT_SECONDS


def beat(folder: Path, step: int, **more) -> None:
    """Say that the recording in `folder` lives: time, process and the last step received. Raises OSError."""
    who = {"pid": os.getpid(), "host": platform.node(), "machine": machine()}
    write_json(folder / files.HEARTBEAT, {"time": time.time(), **who, "step": step, **more}, durable=False)


def beating(folder: Path) -> bool:
    """Whether a living process records into `folder`.

    An end marker, or a process of this very machine that is gone, answers at once. Otherwise the heartbeat is
    watched for ten seconds: that needs no lock, which a network's file system may not have, and no common clock.
    """
    before = _last_beat(folder)
    if (folder / files.END).exists() or gone(read_json(folder / files.HEARTBEAT) or {}):
        return False
    log.info("depthscope looks whether somebody still records at %s; that takes %g s.", folder, WATCH_SECONDS)
    limit = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < limit:
        time.sleep(0.1)
        if (folder / files.END).exists():
            return False
        if _last_beat(folder) != before:
            return True
    return False


def _last_beat(folder: Path) -> bytes | None:
    try:
        return read_bytes(folder / files.HEARTBEAT, MOST_SIGN)
    except (OSError, ValueError):
        return None


def gone(beat: dict) -> bool:
    """Whether the process of a heartbeat ran on this machine, and runs no more."""
    pid = beat.get("pid")
    if os.name != "posix" or beat.get("machine") != machine() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


@cache
def machine() -> str:
    """What tells apart the machines, and the containers on one, that number their processes by themselves.

    It changes when the machine is started again.
    """
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
