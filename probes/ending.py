"""How a recorded process ends: close the run when the interpreter exits, fails or is told to terminate."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable


class Ending:
    """Calls `close(status, reason)` at exit and on SIGTERM, until `release`.

    Kept apart from the recorder's own context manager: a script of one line has none.
    """

    def __init__(self, close: Callable[[str, str], None], early: bool = False):
        """`early`: before the interpreter takes thread pools away, which libraries that send things need."""
        self._close, self._released = close, False
        atexit.register(self._at_exit)
        if early and hasattr(threading, "_register_atexit"):
            weak = weakref.ref(self)  # nothing unregisters it
            with contextlib.suppress(RuntimeError):  # it is ending already
                threading._register_atexit(lambda: (me := weak()) and _no_other_thread() and me._at_exit())
        self._old_sigterm = self._catch_sigterm()

    def release(self) -> None:
        """Nothing is called any more, and SIGTERM is as it was."""
        atexit.unregister(self._at_exit)
        self._released = True
        if self._old_sigterm is not None and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, self._old_sigterm)

    def _at_exit(self) -> None:
        if self._released:
            return
        # Set by the interpreter when it has printed a traceback.
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is None:
            self._close("finished", "")
        else:
            self._close("stopped", describe(error))

    def _catch_sigterm(self):
        """Where nobody else handles SIGTERM, mark the run as stopped before the process goes."""
        try:
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                return None
            return signal.signal(signal.SIGTERM, self._on_sigterm)
        except ValueError:  # not in the main thread
            return None

    def _on_sigterm(self, number, frame) -> None:
        self._close("stopped", "SIGTERM")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _no_other_thread() -> bool:
    """Whether the main thread was the last that worked: others may still train when it has ended, pools only wait."""
    pools = sys.modules.get("concurrent.futures.thread")
    waiting = set(getattr(pools, "_threads_queues", ())) | {
        threading.main_thread(),
        threading.current_thread(),
    }
    return all(thread.daemon or thread in waiting for thread in threading.enumerate())


@contextlib.contextmanager
def finishing():
    """Let a first Ctrl-C that comes meanwhile wait until the end: an end that is interrupted would leave no mark."""
    heard: list[int] = []
    previous = signal.getsignal(signal.SIGINT)

    def wait(number, frame) -> None:
        if heard and callable(previous):
            previous(number, frame)
        heard.append(number)

    try:
        signal.signal(signal.SIGINT, wait)
    except ValueError:  # not in the main thread, where no signal comes
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if len(heard) == 1 and callable(previous):
            previous(signal.SIGINT, None)


def describe(error: BaseException) -> str:
    """The kind of an exception and its message, on one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
