"""A claim: of several processes one at a time is at some work. It ends with its process, however that ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Taken(Exception):
    """Somebody else has it."""


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the claim that `path` stands for; the file, and its folder where that was made for it, go with it. Raises Taken.
    On a disk that knows no locks nothing is guarded."""
    made = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    file = _locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if fcntl is None:  # an open file cannot be removed there
                os.close(file)
            path.unlink()
        if fcntl is not None:
            os.close(file)
        if made:
            with contextlib.suppress(OSError):  # there is something in it
                path.parent.rmdir()


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            os.close(file)
            raise Taken from None
        except OSError:
            return file
        with contextlib.suppress(OSError):  # else its holder removed it in the meantime
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
