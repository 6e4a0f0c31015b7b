"""A machine one can log in to: fsspec's SFTP, through what ssh itself is told on this machine.

fsspec alone believes any machine that answers, reads no ~/.ssh/config, and never comes back when a connection breaks.
"""

import contextlib
import io
import logging
import os
import platform
import shlex
from pathlib import Path

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

_CONNECT, _ANSWER, _ALIVE = 10.0, 30.0, 15.0  # seconds
_PIECE = 32 << 10  # bytes that one answer holds
_GLOBAL_HOSTS = Path("/etc/ssh/ssh_known_hosts")

# What went wrong is said by who asked, in a sentence; paramiko's thread would print a traceback.
_LOG = "depthscope.paramiko"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)


class Machine(SFTPFileSystem):
    """The files of one machine. Raises OSError, paramiko.SSHException."""

    cachable = False  # each has a connection of its own, which it may close

    @classmethod
    def at(cls, url: str) -> tuple["Machine", str]:
        """The machine of an address like ssh://me@host:22/home/me/runs, and the path there; ~ is the home of who logs in."""
        machine, path = cls(**cls._get_kwargs_from_urls(url)), cls._strip_protocol(url)
        if path == "/~" or path.startswith("/~/"):
            path = machine.ftp.normalize(".").rstrip("/") + path[2:]
        return machine, path

    def _connect(self) -> None:
        told = _config(self.host)
        host, given = told["hostname"], {**self.ssh_kwargs}
        given.setdefault("port", int(told.get("port", 22)))
        if "user" in told:
            given.setdefault("username", told["user"])
        # ssh passes over keys that are not there, and paramiko does not.
        given.setdefault("key_filename", [key for key in told.get("identityfile", ()) if Path(key).exists()])
        if told.get("proxyjump", "none") != "none":
            told["proxycommand"] = _by_way_of(told["proxyjump"], host, given["port"])
        if told.get("proxycommand", "none") != "none":
            given.setdefault("sock", paramiko.ProxyCommand(told["proxycommand"]))
        client = paramiko.SSHClient()
        client.set_log_channel(_LOG)
        for known in (*told.get("userknownhostsfile", "~/.ssh/known_hosts").split(), _GLOBAL_HOSTS):
            with contextlib.suppress(OSError):
                client.load_system_host_keys(str(Path(known).expanduser()))
        careless = told.get("stricthostkeychecking") in ("no", "off", "accept-new")
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy() if careless else paramiko.RejectPolicy())
        try:
            client.connect(host, **{"timeout": _CONNECT, "banner_timeout": _CONNECT, **given})
        except paramiko.BadHostKeyException:
            raise OSError(
                "its key is another than the one in ~/.ssh/known_hosts: it may not be that machine"
            ) from None
        except paramiko.AuthenticationException as error:
            raise OSError(f"it lets nobody in like that ({error}): try the same with ssh") from None
        except paramiko.SSHException as error:
            if "not found in known_hosts" in str(error):
                raise OSError(
                    "its key is not in ~/.ssh/known_hosts: log in there once with ssh, which asks about it"
                ) from None
            raise
        client.get_transport().set_keepalive(int(_ALIVE))
        self.client, self.ftp = client, client.open_sftp()
        self.ftp.get_channel().settimeout(_ANSWER)

    def revive(self) -> None:
        """Connect again where the connection is gone."""
        transport = self.client.get_transport()
        if transport is None or not transport.is_active() or self.ftp.get_channel().closed:
            self.drop()
            self._connect()

    def drop(self) -> None:
        """Let the connection go: it answered no more."""
        with contextlib.suppress(Exception):
            self.client.close()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs) -> bytes:
        """A file, or its bytes from `start` to `end`: many requests at once, for a far machine answers late."""
        with self.ftp.open(path, "rb") as file:
            size = file.stat().st_size
            first, last = min(start or 0, size), size if end is None else min(end, size)
            pieces = [(at, min(_PIECE, last - at)) for at in range(first, last, _PIECE)]
            return b"".join(file.readv(pieces)) if pieces else b""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs) -> None:
        """Put a file there, whole or not at all, and the folders it lies in where they are missing. With the mode "create"
        raises FileExistsError where one of that name is; of two that try at once, for one of them."""
        new = mode == "create"
        if new and self.exists(path):
            raise FileExistsError(path)
        folder, _, name = path.rpartition("/")
        aside = f"{folder}/.{name}.tmp-{platform.node()}-{os.getpid()}"
        self._put(aside, value)
        try:
            # The newer of the two replaces a file that is there, and the older one refuses to.
            (self.ftp.rename if new else self.ftp.posix_rename)(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.ftp.remove(aside)
            if new and self.exists(path):
                raise FileExistsError(path) from None
            raise

    def _put(self, path: str, value: bytes) -> None:
        """Write a file in its place, and look whether all of it is there."""
        try:
            try:
                self.ftp.putfo(io.BytesIO(value), path, len(value))
            except FileNotFoundError:
                self.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.ftp.putfo(io.BytesIO(value), path, len(value))
        except OSError as error:
            with contextlib.suppress(Exception):
                self.ftp.remove(path)  # half of it may be there
            if error.errno is None and str(error).startswith(("Failure", "size mismatch")):
                raise OSError("it did not take all of a file: its disk may be full") from None
            raise

    def makedirs(self, path: str, exist_ok: bool = False, **kwargs) -> None:
        """Make a folder and those it lies in; another process may make them at the same time."""
        if path in ("", "/") or self.exists(path):
            return
        self.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            self.ftp.mkdir(path)
        except OSError:
            if not self.exists(path):
                raise


def _by_way_of(jumps: str, host: str, port: int) -> str:
    """The command that is the connection to a host, through others, as `ProxyJump` lists them."""
    *before, last = jumps.split(",")
    through = ["-J", ",".join(before)] if before else []
    last = last if "://" in last else f"ssh://{last}"
    return shlex.join(["ssh", *through, "-W", f"[{host}]:{port}", last])


def _config(host: str) -> dict:
    """What ~/.ssh/config says of a host; `hostname` at least."""
    try:
        found = paramiko.SSHConfig.from_path(os.path.expanduser("~/.ssh/config")).lookup(host)
    except (OSError, paramiko.SSHException):
        found = {}
    return {"hostname": host, **found}
