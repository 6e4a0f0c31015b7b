"""The spool: a folder of this machine into which a run is recorded that lives elsewhere, until it has arrived there.

It is a run folder like any other, below one that is named by the address; a process that is killed leaves it, and the next
one goes on with it.
"""

import hashlib
import os
from collections.abc import Container, Iterator
from pathlib import Path

from probes import manifest as files
from probes.attempts import attempt_folder, claimed
from probes.careful import is_folder
from probes.digest import FOLDER, Digest, DigestError
from probes.jsonfile import read_json, write_json
from probes.life import beating
from probes.manifest import RunError
from probes.ranks import rank_folder, ranks_in
from probes.remote.address import Address
from probes.shard import shard_names
from probes.sizes import bytes_in

WHERE = "DEPTHSCOPE_SPOOL"
SIZE = "DEPTHSCOPE_SPOOL_SIZE"
MOST_BYTES = 16 << 30  # of one recording that may wait, where nobody says otherwise

_ADDRESS = "address.json"


def root() -> Path:
    """Where spools lie: in the folder that DEPTHSCOPE_SPOOL names, else below XDG_STATE_HOME, else ~/.local/state."""
    if given := os.environ.get(WHERE):
        return Path(given).absolute()
    given = os.environ.get("XDG_STATE_HOME", "")
    return (
        (Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state") / "depthscope" / "spool"
    )


class Spool:
    """The folder `run` in which a recording for an address lies; `address` is None where nobody knows it any more."""

    def __init__(self, home: Path, name: str, address: Address | None):
        self.home, self.run, self.address = home, home / name, address
        asked = os.environ.get(SIZE)
        self.most = MOST_BYTES if asked is None else bytes_in(asked, SIZE)

    @classmethod
    def of(cls, address: Address) -> "Spool":
        """The one for an address. Raises RunError where its size is none."""
        key = hashlib.sha256(address.shown.encode()).hexdigest()[:12]
        return cls(root() / f"{address.name or 'run'}-{key}", address.name or "run", address)

    def make(self) -> None:
        """Raises RunError where this machine's disk refuses."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            if not (self.home / _ADDRESS).exists():
                # Without what the address keeps to itself: no password of ours lies on a disk.
                write_json(self.home / _ADDRESS, {"address": self.address.shown})
        except OSError as error:
            raise RunError(
                f"{self.address.shown} is recorded by way of {self.home}, and that cannot be written "
                f"({error.strerror or error}): name another folder with {WHERE}."
            ) from error

    def files(self, rank: int | None = None, attempt: int = 0) -> Iterator[Path]:
        """What is to be sent, shards before what is made of them; with a `rank`, what that of an attempt sends: its own
        files, and with rank 0 those of earlier attempts."""
        skipped = []
        if rank is not None:
            now = attempt_folder(self.run, attempt)
            if rank:
                yield from _files(rank_folder(now, rank), ())
                return
            skipped = [rank_folder(now, other) for other in ranks_in(now) if other]
        yield from _files(self.run, skipped)

    def sizes(self, sent: Container[Path]) -> tuple[int, int]:
        """Bytes that lie here, and those of them that were not sent."""
        found = [(path in sent, _size(path)) for path in _files(self.run, ())]
        return sum(size for _, size in found), sum(size for done, size in found if not done)

    def shrink(self, sent: set[Path], over: int) -> int:
        """Remove `over` bytes of what was sent, the oldest first; how many there were.

        Shards go with the digest that covers them: what follows is not digested twice.
        """
        freed = 0
        for number in (0, *claimed(self.run)):
            for rank in ranks_in(attempt_folder(self.run, number)):
                shards = rank_folder(attempt_folder(self.run, number), rank)
                for name in shard_names(shards / FOLDER):
                    if freed >= over:
                        return freed
                    try:
                        covered = [shards / each for each in Digest(shards / FOLDER / name, shards).names]
                    except (DigestError, FileNotFoundError):
                        continue
                    group = [path for path in (*covered, shards / FOLDER / name) if path.exists()]
                    if set(group) <= sent:
                        freed += sum(map(_size, group))
                        for path in group:
                            path.unlink(missing_ok=True)
        return freed

    def remove(self, paths: Iterator[Path] | list[Path]) -> None:
        """Take away what has arrived, and folders that are empty then."""
        for path in paths:
            path.unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.run, topdown=False):
            _remove_empty(Path(folder))
        if not self.run.exists():
            (self.home / _ADDRESS).unlink(missing_ok=True)
            _remove_empty(self.home)


def left() -> list[Path]:
    """The folders of recordings that lie here."""
    base = root()
    if not base.is_dir():
        return []
    return sorted(path for path in base.iterdir() if (path / _ADDRESS).exists())


def opened(folder: Path) -> tuple[Path, str]:
    """The spool's own folder and the address it is for, given that folder or the run's in it. Raises RunError."""
    for home in (folder, folder.parent):
        told = read_json(home / _ADDRESS)
        if told is not None and isinstance(told.get("address"), str):
            return home, told["address"]
    raise RunError(f"{folder} is no recording that waits to be uploaded: such lie in {root()}.")


def name_in(home: Path) -> str:
    """The name of the run in a spool. Raises RunError where there is none."""
    found = [path.name for path in home.iterdir() if is_folder(path)]
    if len(found) != 1:
        raise RunError(f"{home} holds no run: there is nothing to upload.")
    return found[0]


def recorded(home: Path) -> bool:
    """Whether a process records into a spool now."""
    try:
        run = home / name_in(home)
    except RunError:
        return False
    last = attempt_folder(run, max(claimed(run), default=0))
    return (last / files.HEARTBEAT).exists() and beating(last)


def _files(folder: Path, skipped) -> Iterator[Path]:
    found = []
    for here, below, names in os.walk(folder):
        place = Path(here)
        below[:] = sorted(name for name in below if name[0] != "." and place / name not in skipped)
        found += [place / name for name in sorted(names) if name[0] != "."]
    yield from sorted(found, key=lambda path: (path.parent.name == FOLDER, path))


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
