"""Upload a recording while it is made: sealed shards and the small files go from the spool to where the run lives.

A thread of its own, which training and the writer never wait for. A store that does not answer is asked again, less and
less often; what it has lost is sent again as long as it lies here. What cannot be sent stays in the spool.
"""

import errno
import logging
import shutil
import threading
import time
from pathlib import Path

from probes import manifest as files
from probes import place as places
from probes.manifest import Manifest, RunError
from probes.place import Place
from probes.remote import spool as spools
from probes.remote.address import Address, address
from probes.remote.claiming import Claim, Taken
from probes.remote.spool import Spool
from probes.remote.store import Store, Unreachable
from probes.shard import SUFFIX

log = logging.getLogger("depthscope")

PASS_SECONDS = 1.0
BEAT_SECONDS = 4.0  # between two heartbeats that are sent
COMPARE_SECONDS = 30.0  # between two looks at what has arrived
CLOSE_SECONDS = 60.0  # that the end of a recording waits for its upload, and
OFFLINE_SECONDS = 10.0  # where the store does not answer

_FIRST_WAIT, _LAST_WAIT = 1.0, 60.0
_PART = 20  # of the time between two looks, that they may take
_SIGNS = (files.HEARTBEAT, files.END)
_ONCE = (files.MANIFEST, files.ATTEMPT)  # written by one process, once
_ROOM = 0.9  # of the spool that may be in use before what has arrived is removed


class Upload:
    """The way of a recording from its `spool` to an address. `prepare` before the recording is begun, `begin` when its folder
    is claimed, `close` when it has ended."""

    def __init__(self, spool: Spool):
        """Raises RunError where a package is missing."""
        self.spool, self.address = spool, spool.address
        self._store: Store | None = None
        self._place: Place | None = None
        self._prepared = self._claimed = False
        self._sent: dict[Path, tuple[int, int]] = {}  # size and time of what has arrived
        self._signs: dict[Path, bytes] = {}
        self._beaten = self._compared = -float("inf")
        self._took = 0.0
        self._sized: tuple[float, int, int] = (-float("inf"), 0, 0)
        self._offline = ""  # why the store did not answer
        self._told: set[str] = set()
        self._wait = _FIRST_WAIT
        self.gone = False  # another run is at the address
        self._closing, self._end_at = threading.Event(), float("inf")
        self._thread: threading.Thread | None = None
        try:
            self._connected()
        except OSError as error:
            self._lost(error)

    # For whoever records

    @property
    def run(self) -> Path:
        """The folder of this machine to record into."""
        return self.spool.run

    def prepare(self, resume: bool) -> None:
        """Look what is at the address; to `resume` a run, take what its next attempt has to know. Raises RunError."""
        here, self._prepared = (self.run / files.MANIFEST).exists(), True
        try:
            claim = self._claim()
            if claim.begun():
                if not resume:
                    raise RunError(
                        f"{self.address.shown} already holds a run: give another path, or delete that folder to record anew, or "
                        "continue the run with resume=True."
                    )
                self.spool.make()
                claim.pull()
            elif not here and claim.somebody(""):
                raise RunError(claim.recorded(""))
        except Unreachable as error:
            if resume and not here:
                raise RunError(
                    f"{self.address.shown} cannot be reached ({error}), so that nobody knows whether there is a run to continue: "
                    "try again when it can, or record a new run."
                ) from error
            self._lost(error)
        if here and not resume:
            raise RunError(
                f"{self.spool.home} holds a recording for {self.address.shown} that was never uploaded as a whole: continue it "
                f"with resume=True, or send it with depthscope upload {self.spool.home}, or delete that folder."
            )
        self.spool.make()

    def take_place(self, manifest: Manifest, resume: bool) -> Place:
        """Claim the run, here and at the address. Raises RunError."""
        if not self._prepared:  # of several processes one that records for itself
            self.prepare(resume)
        if not resume:
            place = places.begin(self.run, manifest)
        else:
            # What was pulled has no signs of life here: claim.pull has looked for them.
            place = places.resume(
                self.run, manifest, lambda at: (at / files.HEARTBEAT).exists() and places.beating(at)
            )
        try:
            self._claim().take(place.folder)
            self._claim().beat(place.folder)
            self._claimed = True
        except Taken as taken:
            shutil.rmtree(place.folder, ignore_errors=True)
            raise RunError(str(taken)) from None
        except OSError as error:
            self._lost(error)
        return place

    def begin(self, place: Place) -> None:
        """Send what lies in the spool of a place, from now on."""
        self._place, self._claimed = place, self._claimed or place.rank > 0
        place.admit = self._admit
        self._thread = threading.Thread(
            target=self._work, name=f"depthscope upload {self.run.name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Send what is left, for a minute at most, and say what could not be sent."""
        self._end_at = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        self._thread.join(CLOSE_SECONDS + 5)
        if not self._thread.is_alive() and not self.gone and not self.waiting():
            self._clear()
            return
        count, size = (
            len(self.waiting()),
            sum(path.lstat().st_size for path in self.waiting() if path.exists()),
        )
        log.warning(
            "%s (%.1f MB) of %s are not uploaded%s: they lie in %s. Send them with: depthscope upload %s%s",
            f"{count} files" if count != 1 else "1 file",
            size / 1e6,
            self.address.shown,
            f" ({self._offline})" if self._offline else "",
            self.spool.home,
            self.spool.home,
            " OTHER-ADDRESS" if self.gone else "",
        )

    # What is to be sent

    def waiting(self) -> list[Path]:
        """Files that lie here and have not arrived."""
        found = []
        for path in self._files():
            if path.name in _SIGNS:
                if self._signs.get(path) is None or _content(path) != self._signs[path]:
                    found.append(path)
            elif self._sent.get(path) != _stamp(path):
                found.append(path)
        return found

    def send(self) -> int:
        """Send all that lies here, now; how many files that were. Raises RunError, OSError."""
        before = len(self._sent)
        claim = self._claim()
        for path in self._files():
            if path.name in _ONCE:
                claim.take(path.parent)
        self._claimed = True
        self._closing.set()
        self._pass()
        self._compare()
        self._pass()
        if waiting := self.waiting():
            raise OSError(f"{len(waiting)} files were not taken")
        count = len(self._sent) + len(self._signs) - before
        self._clear()
        return count

    # The thread

    def _work(self) -> None:
        while not self.gone:
            began = time.monotonic()
            done = self._try()
            if self._closing.is_set() and (done or time.monotonic() >= self._end_at):
                return
            # A wait that ends when the recording does, or the next try after it.
            took = time.monotonic() - began  # as a rule to look through the folder of a long run
            wait = self._wait if self._offline else max(PASS_SECONDS, _PART * min(took, 1.0))
            if self._closing.is_set():
                self._end_at = (
                    min(self._end_at, time.monotonic() + OFFLINE_SECONDS) if self._offline else self._end_at
                )
                time.sleep(min(wait, 1.0))
            else:
                self._closing.wait(wait)

    def _try(self) -> bool:
        """One pass; whether all that lay here has arrived. Never raises."""
        closing = self._closing.is_set()
        try:
            if closing or time.monotonic() - self._compared > max(COMPARE_SECONDS, _PART * self._took):
                self._compare()
            if not self._claimed:
                self._claim().take(self._place.folder)
                self._claimed = True
            self._pass()
            self._found()
            return closing and not self.waiting()
        except Taken as taken:
            self.gone = True
            log.warning("%s Training goes on, and its recording stays in %s.", taken, self.spool.home)
        except OSError as error:
            self._lost(error)
        except Exception as error:  # a store of another kind than we know
            self._lost(Unreachable(self.address.hide(error)))
        return False

    def _pass(self) -> None:
        """Send what is new. A sign of life is as it was before the shards were looked for: it counts them."""
        store, closing = self._connected(), self._closing.is_set()
        beats = closing or time.monotonic() - self._beaten >= BEAT_SECONDS
        signs = {path: _content(path) for path in self._files() if path.name in _SIGNS} if beats else {}
        for path in self._files():
            if path in self._sent and path.name.endswith(SUFFIX):
                continue  # which never changes
            if path.name in _SIGNS or self._sent.get(path) == (stamp := _stamp(path)):
                continue
            if not (path.name.endswith((SUFFIX, ".json")) or closing):
                continue  # of others, as event files, that grow
            if path.name in _ONCE:
                self._claim().take(path.parent)
            elif (content := _content(path)) is not None:
                store.write(self._inner(path), content)
            self._sent[path] = stamp
            if time.monotonic() > self._end_at:
                return
        for path in sorted(signs, key=lambda path: path.name == files.END):
            if signs[path] is not None and signs[path] != self._signs.get(path):
                store.write(self._inner(path), signs[path])
                self._signs[path] = signs[path]
        if beats:
            self._beaten = time.monotonic()
        if (over := self._size()[0] - int(_ROOM * self.spool.most)) > 0:
            self.spool.shrink(set(self._sent), over)

    def _compare(self) -> None:
        """Look what has arrived: what is here and not there counts as not sent."""
        began, store = time.monotonic(), self._connected()
        found: dict[Path, list[Path]] = {}
        for path in self._files():
            found.setdefault(path.parent, []).append(path)
        for folder, paths in found.items():
            try:
                there = {each.name: each.size for each in store.list(self._inner(folder)) if not each.folder}
            except FileNotFoundError:
                there = {}
            for path in paths:
                same = there.get(path.name) == path.lstat().st_size if path.exists() else False
                if path.name in _SIGNS:
                    if path.name not in there:
                        self._signs.pop(path, None)
                elif not same:
                    if self._sent.pop(path, None) is not None:
                        self._say(
                            "lost", f"{self.address.shown} has lost what had arrived there; it is sent again."
                        )
                elif path.name.endswith(SUFFIX):
                    self._sent.setdefault(path, _stamp(path))
        if self._place is not None and self._place.rank == 0:
            claim = self._claim()
            if claim.begun():
                claim.ours(self.run)
            if claim.later(self._place.number):
                self._say(
                    "resumed", f"Another process has continued the run at {self.address.shown} meanwhile."
                )
        self._compared, self._took = time.monotonic(), time.monotonic() - began

    # The store

    def _connected(self) -> Store:
        if self._store is None:
            self._store = Store(self.address)
        return self._store

    def _claim(self) -> Claim:
        return Claim(self._connected(), self.run)

    def _lost(self, error: OSError) -> None:
        self._wait = min(2 * self._wait, _LAST_WAIT) if self._offline else _FIRST_WAIT
        self._offline = self.address.hide(getattr(error, "strerror", None) or error)
        self._compared = -float("inf")  # it may come back without what it had
        self._say(
            "offline",
            f"{self.address.shown} does not take the recording ({self._offline}). Training goes on, and so does recording, into "
            f"{self.spool.home}; what lies there is sent when it can be.",
        )

    def _found(self) -> None:
        if self._offline:
            log.info("depthscope reaches %s again.", self.address.shown)
        self._offline, self._wait = "", _FIRST_WAIT

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", sentence)

    # The spool

    def _files(self) -> list[Path]:
        if self._place is None:
            return list(self.spool.files())
        return list(self.spool.files(self._place.rank, self._place.number))

    def _inner(self, path: Path) -> str:
        inner = path.relative_to(self.run).as_posix()
        return "" if inner == "." else inner

    def _size(self) -> tuple[int, int]:
        """Bytes that lie here, and those of them that have not arrived."""
        again_at, *sizes = self._sized
        if (now := time.monotonic()) >= again_at:
            sizes = self.spool.sizes(self._sent)
            self._sized = now + max(PASS_SECONDS, _PART * (time.monotonic() - now)), *sizes
        return sizes[0], sizes[1]

    def _admit(self) -> None:
        """Called before a shard is sealed. Raises OSError while no more may wait here."""
        if (waiting := self._size()[1]) > self.spool.most:
            raise OSError(errno.ENOSPC, f"{waiting / 1e9:.1f} GB wait there to be uploaded, and no more may")

    def _clear(self) -> None:
        """Everything has arrived: the spool goes."""
        self.spool.remove(self._files())


def upload_for(path) -> Upload | None:
    """The upload of a recording at a path; None where that is of this machine. Raises RunError."""
    where = address(path)
    return None if where is None else _upload(where)


def _upload(where: Address) -> Upload:
    if where.protocol in ("hf", "http", "https"):
        raise RunError(
            f"Runs can be read from {where.protocol}://, and not recorded to it: record into a folder here, and upload that."
        )
    return Upload(Spool.of(where))


def send(folder: Path, to: str | None = None) -> str:
    """Send a recording that was left in a spool, to its address or another; a sentence on what was done.

    Raises RunError, OSError.
    """
    home, told = spools.opened(folder)
    if spools.recorded(home):
        raise RunError(f"{home} is being recorded: it is sent as it grows.")
    where = address(told if to is None else to)
    if where is None:
        raise RunError(f"{to} is no address: copy {home} there as it is.")
    spool = Spool(home, spools.name_in(home), where)
    try:
        count = Upload(spool).send()
    except Taken as taken:
        raise RunError(str(taken)) from None
    except Unreachable as error:
        raise RunError(f"{where.shown} does not take it ({error}); it stays in {home}.") from error
    return f"{where.shown}: {count} files sent; {home} is empty now and was removed."


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        told = path.lstat()
    except OSError:
        return None
    return told.st_size, told.st_mtime_ns


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
