"""A store: what lists, reads and writes the files of an address, through fsspec. Each failure is an OSError in plain words."""

import contextlib
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from probes.manifest import RunError
from probes.remote.address import Address, safe

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "ssh": "paramiko",
    "sftp": "paramiko", "az": "adlfs", "abfs": "adlfs", "smb": "smbprotocol", "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip
# Where a file that is being written could be seen half; the others show it when it is whole.
_IN_PLACE = ("ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs")
# A connection that is gone is to be noticed before somebody wonders.
_PATIENCE = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 1}}
_STAMPS = (
    "ETag", "etag", "md5Hash", "md5", "generation", "blob_id", "oid", "mtime", "modified", "LastModified", "last_modified",
    "updated", "created",
)  # fmt: skip
_MOST_NAMES = 200_000  # of one folder
_TOGETHER = 16


class Unreachable(OSError):
    """The store did not answer, or not as asked; the message says why in a clause."""


@dataclass(frozen=True)
class Listed:
    """A name in a folder; `stamp` changes when the file does."""

    name: str
    folder: bool
    size: int
    stamp: str


class Store:
    """The files behind an address. Paths are those below it, with slashes; "" is the folder that the address names."""

    def __init__(self, address: Address):
        """Raises RunError where a package is missing or the address is none, Unreachable where it does not answer."""
        self.address = address
        try:
            import fsspec
            from fsspec.core import url_to_fs
        except ImportError:
            raise RunError(
                f'{address.shown} needs fsspec: pip install "depthscope[remote]"{_driver(address.protocol)}.'
            ) from None
        options = {}
        if address.protocol in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
            options["config_kwargs"] = _PATIENCE
        self._turn = contextlib.nullcontext  # within which one thing is asked
        try:
            if address.protocol in ("sftp", "ssh"):
                from probes.remote.ssh import Machine

                self._files, self._root = Machine.at(address.url)
                self._turn = self._files.session
            else:
                self._files, self._root = url_to_fs(address.url, **options)
        except ImportError:
            package = PACKAGES.get(address.protocol)
            raise RunError(
                f"{address.shown} needs {f'{package}: pip install {package}' if package else 'a package that is not installed'}."
            ) from None
        except ValueError as error:
            known = "://, ".join(("s3", "gs", "hf", "sftp"))
            raise RunError(
                f"{address.shown} cannot be opened ({address.hide(error)}): give a folder, or an address like {known}://."
            ) from None
        except Exception as error:  # some connect at once
            raise Unreachable(address.hide(_why(error))) from None
        self._root = self._root.rstrip("/")
        self._hosted = not getattr(self._files, "async_impl", False) and address.protocol != "memory"
        self._one_by_one = self._hosted and self._turn is contextlib.nullcontext
        if self._one_by_one:
            lock = threading.RLock()
            self._turn = lambda: lock

    @property
    def root(self) -> tuple[str, ...]:
        """The names that lead to the address: container and folders."""
        return tuple(part for part in self._root.split("/") if part)

    @property
    def key(self) -> str:
        """The same for all addresses in one place, and of no other; nothing can be learned from it."""
        host = self.address.shown.split("://")[1].split("/")[0] if self._hosted else ""
        endpoint = [
            str(getattr(self._files, "endpoint_url", "") or ""),
            *(os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")),
        ]
        whole = json.dumps([self.address.protocol, host, endpoint])
        return hashlib.sha256(whole.encode()).hexdigest()[:24]

    def list(self, path: str) -> list[Listed]:
        """What lies in a folder, names that may be files here only. Raises FileNotFoundError, Unreachable."""
        place = self._at(path)

        def look() -> list[dict]:
            self._files.invalidate_cache(place)  # what was heard before is what we ask about
            return self._files.ls(place, detail=True)

        found, below = {}, place.strip("/")
        for entry in self._do(look):
            name = str(entry["name"]).strip("/")
            name = name.removeprefix(below + "/") if below else name
            if name == below or not safe(name) or len(found) >= _MOST_NAMES:
                continue
            kind = entry.get("type")
            if kind == "directory":
                found.setdefault(name, Listed(name, True, 0, ""))
            elif kind == "file":
                size = entry.get("size")
                size = size if type(size) is int and size >= 0 else 0
                told = [f"{key}={entry[key]}" for key in _STAMPS if entry.get(key) is not None]
                found[name] = Listed(
                    name, False, size, hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]
                )
        return list(found.values())

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file, or its bytes from `start` to `stop`. Raises FileNotFoundError, Unreachable."""
        content = self._do(lambda: bytes(self._files.cat_file(self._at(path), start=start, end=stop)))
        wanted = None if stop is None else stop - (start or 0)
        if wanted is not None and len(content) > wanted:  # of a driver that knows whole files only
            content = content[start or 0 : stop]
        return content

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Whole files, several at once; those that cannot be read are missing from what comes back."""
        paths = list(paths)
        if self._one_by_one or len(paths) < 2:
            return {path: content for path in paths if (content := self._tried(path)) is not None}
        with ThreadPoolExecutor(_TOGETHER) as pool:
            found = pool.map(self._tried, paths)
            return {path: content for path, content in zip(paths, found, strict=True) if content is not None}

    def together(self, act, these: Iterable) -> None:
        """`act` on each of these, several at once where the store can; it raises nothing."""
        these = list(these)
        if self._one_by_one or len(these) < 2:
            for each in these:
                act(each)
            return
        with ThreadPoolExecutor(_TOGETHER) as pool:
            list(pool.map(act, these))

    def write(self, path: str, content: bytes, new: bool = False) -> None:
        """Put a file there, whole; with `new` raises FileExistsError where one is, as far as the store can tell.

        Raises Unreachable, where there is no bucket too.
        """
        place = self._at(path)

        def put() -> None:
            if self.address.protocol not in _IN_PLACE:
                self._files.pipe_file(place, content, **({"mode": "create"} if new else {}))
                return
            if new and self._files.exists(place):
                raise FileExistsError(place)
            folder, _, name = place.rpartition("/")
            self._files.makedirs(folder, exist_ok=True)
            aside = f"{folder}/.{name}.tmp-{platform.node()}-{os.getpid()}"
            self._files.pipe_file(aside, content)
            if self._files.exists(place):
                self._files.rm_file(place)  # not all of them replace
            self._files.mv(aside, place)

        try:
            self._do(put)
        except FileNotFoundError:
            whole = f"{self.address.shown}/"
            bucket = f"{self.address.protocol}://{self.root[0]}/" if self.root else whole
            where = (bucket if whole.startswith(bucket) else whole).rstrip("/")
            raise Unreachable(
                f"there is no {where} to write into: make it, or give another address"
            ) from None

    def remove(self, path: str) -> None:
        """Take a file away. Raises FileNotFoundError, Unreachable."""
        self._do(lambda: self._files.rm_file(self._at(path)))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root or "/"

    def _tried(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except OSError:
            return None

    def _do(self, act):
        try:
            with self._turn():
                return act()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.address.shown} has no such file") from None
        except FileExistsError:
            raise
        except Exception as error:
            raise Unreachable(self.address.hide(_why(error))) from None


def _why(error: BaseException) -> str:
    """What an exception says, or what it is; of several lines the first."""
    said = getattr(error, "strerror", None) or str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _driver(protocol: str) -> str:
    package = PACKAGES.get(protocol)
    return f" {package}" if package not in (None, "s3fs") else ""
