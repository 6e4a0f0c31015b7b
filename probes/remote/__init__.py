"""Runs that live elsewhere: `s3://bucket/runs` and whatever else fsspec opens, read through a cache and written through a
spool. `local` is the door for readers, `Upload` (uploading.py) that for a writer."""

import os
import threading
from pathlib import Path

from probes import elsewhere
from probes.manifest import RunError
from probes.remote import cache as caches
from probes.remote.address import Address, address, on_this_machine
from probes.remote.shadow import Shadow
from probes.remote.store import Store, Unreachable
from probes.sizes import bytes_in

__all__ = ["Address", "address", "local", "on_this_machine", "troubles"]

_shadows: dict[str, Shadow] = {}
_lock = threading.Lock()
_cache: caches.Cache | None = None


def local(path: str | os.PathLike) -> Path:
    """The folder to read: a path of this machine as it is; of an address a folder of the cache that looks like it.

    Raises RunError where a package is missing, or the address is none.
    """
    where = address(path)
    if where is None:
        return on_this_machine(path)
    with _lock:
        if where.url not in _shadows:
            try:
                _shadows[where.url] = Shadow(Store(where), _opened())
            except Unreachable as error:
                raise RunError(f"{where.shown} cannot be reached: {error}.") from None
            elsewhere.add(_shadows[where.url])
        return _shadows[where.url].root


def troubles() -> list[str]:
    """A sentence for each address that does not answer."""
    return [shadow.trouble for shadow in list(_shadows.values()) if shadow.trouble]


def _opened() -> caches.Cache:
    global _cache
    base = caches.root()
    if _cache is None or _cache.root != base:
        asked = os.environ.get(caches.SIZE)
        _cache = caches.Cache(base, caches.MOST_BYTES if asked is None else bytes_in(asked, caches.SIZE))
    return _cache
