"""The place of one recording: a folder claimed by one writer, made anew when it vanishes, left alone when it is another's.

No locks, which a network's file system may not have or may hold for a dead process: what exactly one process can do
is to make a folder, and so making it is the claim. A writer that was taken for dead and wakes up again writes into its
own attempt's folder, where it harms nobody.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from probes import manifest as files
from probes.attempts import attempt_folder, claimed
from probes.careful import stamp
from probes.jsonfile import MOST_BYTES, read_json, write_json
from probes.layout import difference
from probes.life import beat, beating
from probes.manifest import Manifest, RunError
from probes.ranks import MANIFEST as RANK
from probes.ranks import rank_folder


class Place:
    """Where one attempt writes. `begin` and `resume` give one; one that is not `claimed` is when it is first restored."""

    def __init__(
        self,
        run: Path,
        number: int,
        about: dict[Path, dict],
        rank: int = 0,
        created: float = 0.0,
        claimed: bool = True,
    ):
        self.run, self.number, self.rank = run, number, rank
        self.shards = rank_folder(attempt_folder(run, number), rank)
        self.folder = self.shards if rank else attempt_folder(run, number)  # of heartbeat and end marker
        self._about = about  # the content of run.json, and of attempt.json
        self.created = about.get(run / files.MANIFEST, {}).get("created", created)
        self.admit: Callable[[], None] = lambda: None  # raises OSError where no more shards are to be sealed
        self._device = os.stat(_there(run)).st_dev
        self._stamp: object = None
        self._claimed, self._begun = claimed, False

    @property
    def resumed(self) -> bool:
        """Whether a later attempt has begun: its rows hide ours from its first step on."""
        return any(number > self.number for number in claimed(self.run))

    def restore(self) -> bool:
        """Make anew what has been deleted; whether anything was.

        Not where the disk itself is gone: that place will come back. Raises RunError when another run is there now,
        OSError when the disk refuses.
        """
        manifest = self.run / files.MANIFEST
        if stamp(manifest) != self._stamp:
            there = read_json(manifest, MOST_BYTES)
            if there is not None and there.get("created") != self.created:
                raise RunError(f"another run was begun at {self.run}")
        if not self._claimed:
            self._claim()
        begun, lost = self._begun, [path for path in self._about if not path.exists()]
        if not lost and self.shards.is_dir():
            self._stamp, self._begun = stamp(manifest), True
            return False
        if os.stat(_there(self.run)).st_dev != self._device:
            raise FileNotFoundError(f"{self.run} is gone, and its disk with it")
        self.shards.mkdir(parents=True, exist_ok=True)
        for path in lost:
            write_json(path, self._about[path])
        self._begun = True
        return begun

    def _claim(self) -> None:
        """Take the attempt. Raises RunError when somebody else has, OSError when the disk refuses."""
        try:
            self.folder.mkdir()
        except FileExistsError:
            raise RunError(_recorded(self.run, self.folder)) from None
        self._claimed = True
        with contextlib.suppress(OSError):  # it is made with what else is lost
            (self.folder / files.RANK_FOLDER).mkdir()
            beat(self.folder, -1)


def begin(run: Path, manifest: Manifest) -> Place:
    """Claim `run` for a new run. Raises RunError when something is there or the disk refuses."""
    if (run / files.MANIFEST).exists():
        raise RunError(
            f"{run} already holds a run: give another path, or delete that folder to record anew, or continue the run "
            "with resume=True."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        if any(not _unborn(path) for path in run.iterdir()):
            raise RunError(f"{run} is not empty: give a new folder for the run.")
        try:
            (run / files.RANK_FOLDER).mkdir()
        except FileExistsError:  # somebody is beginning one, or was killed when he did
            if beating(run) or (run / files.MANIFEST).exists():
                raise RunError(_recorded(run, run)) from None
        # run.json last: with it the folder becomes a run, and by then everything else is there.
        beat(run, -1)
        return _made(Place(run, 0, {run / files.MANIFEST: manifest.to_json()}))
    except OSError as error:
        raise _refused(run, error) from error


def resume(run: Path, manifest: Manifest, alive: Callable[[Path], bool] | None = None) -> Place:
    """Claim the next attempt of `run`, or begin the run where there is none; `alive` tells whether somebody still records, by the heartbeat unless given.

    A disk that refuses is asked again by the writer: a job that is started again at night is to go on. Raises RunError when the
    run is of another model, or when somebody still records it.
    """
    if not (run / files.MANIFEST).exists():
        return begin(run, manifest)
    recorded = Manifest.read(run)
    if other := difference(recorded.layout, manifest.layout):
        raise RunError(f"The run at {run} cannot be continued with this model: {other}. Give another path.")
    number = max(claimed(run), default=0)
    if (alive or beating)(attempt_folder(run, number)):
        raise RunError(_recorded(run, attempt_folder(run, number)))
    about = {
        run / files.MANIFEST: read_json(run / files.MANIFEST, MOST_BYTES) or recorded.to_json(),
        attempt_folder(run, number + 1) / files.ATTEMPT: manifest.to_json(),
    }
    place = Place(run, number + 1, about, claimed=False)
    with contextlib.suppress(OSError):
        place.restore()
    return place


def join(run: Path, number: int, rank: int, created: float, manifest: Manifest | None) -> Place:
    """The place of another rank than 0 in an attempt that rank 0 has begun in a run that was `created` then; `manifest` says
    what it records where that is not what rank 0 does. A disk that refuses is asked again by the writer: this rank is not
    to fail where the others go on."""
    folder = rank_folder(attempt_folder(run, number), rank)
    about = {} if manifest is None else {folder / RANK: manifest.to_json()}
    place = Place(run, number, about, rank, created)
    with contextlib.suppress(OSError, RunError):
        folder.mkdir(parents=True, exist_ok=True)
        beat(folder, -1)
        place.restore()
    return place


def _made(place: Place) -> Place:
    """Write what is not there yet; with it the attempt becomes visible."""
    place.restore()
    return place


def _unborn(path: Path) -> bool:
    """Whether a file of a folder is what a process leaves that is killed while it begins a run."""
    if path.name == files.RANK_FOLDER:
        return not any(path.iterdir())
    return path.name == files.HEARTBEAT or path.name.startswith(
        (f".{files.HEARTBEAT}.", f".{files.MANIFEST}.")
    )


def _there(path: Path) -> Path:
    """The nearest folder above that is there, or the path itself."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _recorded(run: Path, folder: Path) -> str:
    beat = read_json(folder / files.HEARTBEAT) or {}
    who = f"process {beat['pid']} on {beat.get('host')}" if "pid" in beat else "another process"
    return f"{run} is being recorded by {who}: stop that one first, or give another path."


def _refused(run: Path, error: OSError) -> RunError:
    return RunError(f"The run cannot be recorded at {run}: {error.strerror or error}.")
