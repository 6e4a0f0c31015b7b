"""Write a file that is complete or not there at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """`content` at `path`, in place of what was there: a temporary file beside it, renamed. `durable` waits for the disk.

    Raises OSError when the disk refuses; nothing is left behind then.
    """
    # A name that nobody has: another machine may have a process of our number, and a stranger's folder a link in waiting.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
