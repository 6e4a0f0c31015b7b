"""What goes wrong inside the probe: training goes on, and what can no longer be trusted is left out."""

import contextlib
import logging
from collections.abc import Callable, Iterator

log = logging.getLogger("depthscope")


class Faults:
    """`now` are the metrics that are missing from this step; `missing` says of each when that began, and why.

    With `strict` an error is raised instead.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self.step: Callable[[], int] = lambda: 0
        self.now: set[str] = set()
        self.missing: dict[str, dict] = {}

    def reset(self) -> None:
        """A new step begins, and with it another try."""
        self.now = set()

    def caught(self, error: Exception, *metrics: str) -> None:
        """`metrics` could not be measured because of `error`: leave them out of this step, and say so once."""
        if self._strict:
            raise error
        self.now |= set(metrics)
        new = [name for name in metrics if name not in self.missing]
        if not new:
            return
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.missing |= {name: {"step": self.step(), "cause": cause} for name in new}
        log.warning(
            "depthscope could not record %s at step %d: %s. Training goes on; strict=True raises instead.",
            ", ".join(new),
            self.step(),
            cause,
            exc_info=error,
        )

    @contextlib.contextmanager
    def guard(self, *metrics: str) -> Iterator[None]:
        """Errors inside belong to the probe, and cost no more than `metrics`."""
        try:
            yield
        except Exception as error:
            self.caught(error, *metrics)
