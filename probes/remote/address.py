"""Addresses of runs that live elsewhere: `s3://bucket/runs`, as somebody gives them and as they may be shown and kept."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from probes.careful import printable
from probes.manifest import RunError

# A path object has lost one of the two slashes. A letter alone is a disk of Windows.
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(?=[^/]|$)(.*)", re.S)
_HOSTS = ("sftp", "ssh", "ftp", "smb")  # where a name before the host is no secret, as a password is
_MOST_NAME = 200  # bytes


@dataclass(frozen=True)
class Address:
    """Where something lives: `url` is what opens it, secrets and all; `shown` is what may be said and written down."""

    protocol: str
    url: str
    shown: str

    @property
    def name(self) -> str:
        return self.shown.rstrip("/").rpartition("/")[2]

    def hide(self, text: object) -> str:
        """Somebody's words on one line, without what the address keeps to itself."""
        found = str(text).replace(self.url, self.shown)
        parts = urlsplit(self.url)
        for secret in {parts.password, unquote(parts.password or ""), parts.query} - {None, ""}:
            found = found.replace(secret, "…")
        return printable(found)


def address(path: str | os.PathLike) -> Address | None:
    """The address that a path is; None where it is of this machine. Raises RunError for one that leads nowhere."""
    text = os.fspath(path)
    found = _URL.fullmatch(text) if isinstance(text, str) else None
    if found is None or (":/" in text and "://" not in text and os.path.exists(text)):
        return None
    protocol, rest = found[1].lower(), found[2]
    if protocol in ("file", "local"):
        return None
    slashes = ":///" if re.match(r"[^:]+:///", text) else "://"
    url = f"{protocol}{slashes}{rest}".rstrip("/")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.username and protocol in _HOSTS:
        host = f"{parts.username}@{host}"
    shown = f"{protocol}://{host}{parts.path}"
    for name in (*host.split("/"), *parts.path.split("/")):
        if name and not safe(name):
            raise RunError(
                f"{printable(shown)} is no address of runs: {printable(name)!r} is no name of a folder."
            )
    return Address(protocol, url, printable(shown, 2000))


def on_this_machine(path: str | os.PathLike) -> Path:
    """The path of what is no address elsewhere; `file:///tmp/runs` is /tmp/runs."""
    text = os.fspath(path)
    found = re.match(r"(?:file|local):/+", text) if isinstance(text, str) else None
    return Path(path) if found is None else Path("/" + unquote(text[found.end() :]))


def safe(name: str) -> bool:
    """Whether a name from elsewhere may be that of a file here: of one folder, visible, and of no other meaning."""
    if not name or name[0] == "." or not name.isprintable() or len(name.encode()) > _MOST_NAME:
        return False
    return not set(name) & set("/\\\0" if os.name == "posix" else '/\\\0:*?"<>|')
