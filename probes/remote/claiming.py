"""The claim on a run that lives elsewhere: one writer an attempt, as far as the store can tell two apart.

What exactly one process can do there is to make a file that is not there yet: run.json, or attempt.json of the next attempt.
"""

import contextlib
import time
from pathlib import Path

from probes import manifest as files
from probes.attempts import attempt_number
from probes.jsonfile import MOST_BYTES, MOST_SIGN, parse_json
from probes.life import gone
from probes.manifest import RunError
from probes.remote.store import Store
from probes.whole import write_whole

WATCH_SECONDS = 20.0  # several heartbeats, as they are sent


class Taken(Exception):
    """Somebody else's run is there; the message is a sentence."""


class Claim:
    """On what `store` names, for the recording that lies in the folder `run` of this machine."""

    def __init__(self, store: Store, run: Path):
        self._store, self._run = store, run

    def begun(self) -> bool:
        """Whether a run is there. Raises Unreachable."""
        return files.MANIFEST in self._names("")

    def later(self, number: int) -> bool:
        """Whether an attempt after that `number` is there. Raises Unreachable."""
        return max(self._attempts(), default=0) > number

    def take(self, folder: Path) -> None:
        """Put the manifests of an attempt where none are. Raises Taken, Unreachable."""
        for path in dict.fromkeys((self._run / files.MANIFEST, folder / files.ATTEMPT)):
            if not path.exists():
                continue
            content, inner = path.read_bytes(), path.relative_to(self._run).as_posix()
            try:
                self._store.write(inner, content, new=True)
            except FileExistsError:
                self._compare(inner, content)

    def beat(self, folder: Path) -> None:
        """Show that an attempt that was taken lives. Raises Unreachable."""
        path = folder / files.HEARTBEAT
        self._store.write(path.relative_to(self._run).as_posix(), path.read_bytes())

    def ours(self, run: Path) -> None:
        """Raises Taken where the run there is another than the one here, Unreachable."""
        with contextlib.suppress(FileNotFoundError):
            self._compare(files.MANIFEST, (run / files.MANIFEST).read_bytes())

    def pull(self) -> None:
        """Take the manifests of the run and its attempts, which a next attempt has to know.

        Raises RunError where it is recorded now, or another run than what lies here; Unreachable.
        """
        content = self._read(files.MANIFEST, MOST_BYTES)
        here = self._run / files.MANIFEST
        if here.exists():
            try:
                self._compare(files.MANIFEST, here.read_bytes())
            except Taken as taken:
                raise RunError(
                    f"{taken} What was recorded for it before lies in {self._run.parent}: send that elsewhere with depthscope "
                    f"upload {self._run.parent} OTHER-ADDRESS, or delete it."
                ) from None
        attempts = self._attempts()
        last = attempts.get(max(attempts, default=0), "")
        if self.somebody(last):
            raise RunError(self.recorded(last))
        self._keep(here, content)
        for name in attempts.values():
            (self._run / name).mkdir(parents=True, exist_ok=True)
            inner = f"{name}/{files.ATTEMPT}"
            with contextlib.suppress(FileNotFoundError):
                self._keep(self._run / inner, self._read(inner, MOST_BYTES))

    def somebody(self, folder: str) -> bool:
        """Whether a living process records into a folder there: its heartbeat is watched. Raises Unreachable."""
        names = self._names(folder)
        if files.END in names or not names & {files.HEARTBEAT, files.MANIFEST, files.ATTEMPT}:
            return False
        inner = _join(folder, files.HEARTBEAT)
        beat = self._beat(inner)
        if gone(_parsed(beat)):
            return False
        limit = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < limit:
            time.sleep(0.5)
            if self._beat(inner) != beat:
                return True
        return False

    def recorded(self, folder: str) -> str:
        """The sentence on who records there."""
        beat = _parsed(self._beat(_join(folder, files.HEARTBEAT)))
        who = f"process {beat['pid']} on {beat.get('host')}" if "pid" in beat else "another process"
        return f"{self._store.address.shown} is being recorded by {who}: stop that one first, or give another path."

    def _names(self, folder: str) -> set[str]:
        try:
            return {each.name for each in self._store.list(folder)}
        except FileNotFoundError:
            return set()

    def _attempts(self) -> dict[int, str]:
        found = ((attempt_number(name), name) for name in self._names(""))
        return {number: name for number, name in found if number}

    def _beat(self, inner: str) -> bytes:
        try:
            return self._read(inner, MOST_SIGN)
        except FileNotFoundError:
            return b""

    def _read(self, inner: str, most: int) -> bytes:
        return self._store.read(inner, 0, most)

    def _keep(self, path: Path, content: bytes) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def _compare(self, inner: str, content: bytes) -> None:
        there = self._read(inner, MOST_BYTES)
        if there != content and _parsed(there).get("created") != _parsed(content).get("created"):
            raise Taken(f"Another run than the one recorded here was begun at {self._store.address.shown}.")


def _parsed(content: bytes) -> dict:
    try:
        return parse_json(content)
    except ValueError:
        return {}


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
