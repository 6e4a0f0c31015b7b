"""Ask the disk to write, say once when it refuses, and be ready to ask again."""

import logging
from collections.abc import Callable

from probes.manifest import RunError
from probes.place import Place

log = logging.getLogger("depthscope")

_FIRST_WAIT, _LAST_WAIT = 0.25, 10.0  # seconds


class Disk:
    """Writes into a place that may be full, read-only, locked or gone for a while.

    `refused` is what it said last, empty while it takes everything; `wait` are the seconds after which to ask again.
    `gone` is true when another run has taken the place: then nothing is written any more.
    """

    def __init__(self, place: Place):
        self.place = place
        self.refused, self.wait, self.gone = "", _FIRST_WAIT, False
        self._warned = False

    def do(self, act: Callable[[], object]) -> bool:
        """Whether `act`, which writes into the place, succeeded. Never raises."""
        if self.gone:
            return False
        try:
            self._act(act)
        except RunError as error:
            self.gone, self.refused = True, str(error)
            log.warning("depthscope records no more at %s: %s. Training goes on.", self.place.run, error)
            return False
        except Exception as error:
            why = getattr(error, "strerror", None) or error
            self.refused = f"the run could not be written ({why})"
            self.wait = min(2 * self.wait, _LAST_WAIT)
            self._warn(
                f"depthscope cannot write to {self.place.run}: {why}. Training goes on; recording does too when the "
                "place is back."
            )
            return False
        if self.refused:
            log.info("depthscope writes to %s again.", self.place.run)
        self.refused, self.wait = "", _FIRST_WAIT
        return True

    def _act(self, act: Callable[[], object]) -> None:
        self._restore()
        try:
            act()
        except FileNotFoundError:  # deleted at this very moment
            self._restore()
            act()

    def _restore(self) -> None:
        if self.place.restore():
            self._warn(
                f"{self.place.run} was deleted while it was recorded. It is made anew, and recording goes on."
            )

    def _warn(self, sentence: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", sentence)
