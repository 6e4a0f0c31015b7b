"""What goes wrong inside the probe: training goes on, and what can no longer be trusted is left out."""

import contextlib
import logging
from collections.abc import Callable, Iterator

log = logging.getLogger("depthscope")


class Faults:
    """Metrics that are missing, each from a step on, with the cause; `strict` raises instead."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.step: Callable[[], int] = lambda: 0
        self.missing: dict[str, dict] = {}

    def caught(self, error: Exception, *metrics: str) -> None:
        """`metrics` could not be measured because of `error`: say so once, and leave them out from now on."""
        if self.strict:
            raise error
        new = [name for name in metrics if name not in self.missing]
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.missing |= {name: {"step": self.step(), "cause": cause} for name in new}
        if new:
            log.warning(
                "depthscope cannot record %s from step %d on: %s. Training goes on; strict=True raises instead.",
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
