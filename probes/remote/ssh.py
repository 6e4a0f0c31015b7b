"""A machine one can log in to: fsspec's SFTP, through what ssh itself is told on this machine.

fsspec alone believes any machine that answers, reads no ~/.ssh/config, and never comes back when a connection breaks.
"""

import contextlib
import io
import logging
import os
import platform
import queue
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

_CONNECT, _ANSWER, _ALIVE = 10.0, 30.0, 15.0  # seconds
_CHANNELS = 8  # at once, of the ten that OpenSSH lets one connection have
_PIECE = 32 << 10  # bytes that one answer holds
_GLOBAL_HOSTS = Path("/etc/ssh/ssh_known_hosts")

# What went wrong is said by who asked, in a sentence; paramiko's thread would print a traceback.
_LOG = "depthscope.paramiko"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)


class Machine(SFTPFileSystem):
    """The files of one machine, for several threads: each asks within a `session`. Raises OSError, paramiko.SSHException."""

    cachable = False  # each has a connection of its own, which it may close

    def __init__(self, host: str, **options):
        self._lock, self._mine = threading.RLock(), threading.local()
        super().__init__(host, **options)

    @property
    def ftp(self) -> paramiko.SFTPClient:
        """The channel of this thread's session."""
        return self._mine.ftp

    @classmethod
    def at(cls, url: str) -> tuple["Machine", str]:
        """The machine of an address like ssh://me@host:22/home/me/runs, and the path there; ~ is the home of who logs in."""
        machine, path = cls(**cls._get_kwargs_from_urls(url)), cls._strip_protocol(url)
        if path == "/~" or path.startswith("/~/"):
            with machine.session():
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
            client.connect(
                host, **{"timeout": _CONNECT, "banner_timeout": _CONNECT, "channel_timeout": _ANSWER, **given}
            )
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
        self.client, self._channels = client, _Channels(client)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A channel for this thread; the connection is made again where it is gone, and let go where it answers no more."""
        with self._lock:
            if not self._channels.alive:
                self.client.close()
                self._connect()
            channels = self._channels
        self._mine.ftp = channels.take()
        try:
            yield
        except (TimeoutError, EOFError, ConnectionError, paramiko.SSHException):
            channels.client.close()
            raise
        finally:
            channels.give(self.ftp)

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


class _Channels:
    """What several threads ask one connection through, each through one of its own."""

    def __init__(self, client: paramiko.SSHClient):
        self.client = client
        self._lock, self._free = threading.Lock(), queue.LifoQueue()
        self._made, self._most = 0, _CHANNELS

    @property
    def alive(self) -> bool:
        transport = self.client.get_transport()
        return transport is not None and transport.is_active()

    def take(self) -> paramiko.SFTPClient:
        """One that is free, a new one, or the next to become free. Raises OSError, paramiko.SSHException."""
        while self.alive:
            with self._lock:  # of several that open at once paramiko mixes up what went wrong
                if self._free.empty() and self._made < self._most and (ftp := self._new()):
                    return ftp
            try:
                ftp = self._free.get(timeout=1)
            except queue.Empty:
                continue
            if not ftp.get_channel().closed:
                return ftp
            with self._lock:
                self._made -= 1
        raise ConnectionResetError("the connection broke")

    def give(self, ftp: paramiko.SFTPClient) -> None:
        self._free.put(ftp)

    def _new(self) -> paramiko.SFTPClient | None:
        """None where the machine lets nobody have so many."""
        try:
            ftp = self.client.open_sftp()
        except paramiko.SSHException:
            if not self._made or not self.alive:
                raise
            self._most = self._made
            return None
        ftp.get_channel().settimeout(_ANSWER)
        self._made += 1
        return ftp


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
