"""Read what a stranger may have made: regular files of bounded size, or a refusal. Never waits, follows no link."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from probes import elsewhere

_LONGEST = 200  # characters of a metric's name


def read_bytes(path: Path, most: int) -> bytes:
    """The content of `path`, at most `most` bytes.

    Raises FileNotFoundError when it is gone, ValueError for a link, a pipe, a device, a folder or a file too large,
    OSError when it cannot be read.
    """
    with open_file(path, most) as file:
        return file.read(size_of(file))


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    found = getattr(file, "size", None)
    return os.fstat(file.fileno()).st_size if found is None else found


def read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes of an open file. Raises ValueError when it ends before."""
    file.seek(start)
    content = file.read(size)
    if len(content) != size:
        raise ValueError("it ends too early")
    return content


def open_file(path: Path, most: int) -> BinaryIO:
    """A regular file of at most `most` bytes, open for reading; raises as `read_bytes` does."""
    if (shadow := elsewhere.of(path)) is not None:
        return shadow.open(path, most)
    # A pipe would keep us waiting for its writer, a device for ever.
    careful = os.O_NONBLOCK | os.O_NOFOLLOW if os.name == "posix" else os.O_BINARY
    try:
        descriptor = os.open(path, os.O_RDONLY | careful)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise ValueError("is a link to somewhere else") from None
        raise
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("is not a regular file")
        if about.st_size > most:
            raise ValueError(f"is larger than the {most >> 20} MiB that belong there")
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def stamp(path: Path) -> object:
    """Changes when a file is replaced, or grows; None where there is none."""
    try:
        about = os.lstat(path)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def legible(name: str) -> bool:
    """Whether a metric may be called so."""
    return len(name) <= _LONGEST and name.isprintable()


def printable(text: object, most: int = 300) -> str:
    """Somebody's text on one line, at most `most` characters, without what a terminal would obey."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)[:most]
    )


def visible(name: str) -> str:
    """A file's name with what cannot be seen in it written as Python writes it: a line separator as \\u2028, a byte that is no
    text as \\udcff. Different names stay different as far as that is possible."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
