"""Scalars on their way: what the script logs waits, with the step it belongs to, for the next hand-over."""

import time

import torch
from torch import Tensor

from probes.clock import Moment
from probes.vocabulary import metric

# Logged scalars of unrecorded steps wait for company before they cross to the host.
_MANY = 64
_SECONDS = 1.0

Pending = list[tuple[str, Moment, object]]  # name, step, number or tensor []


class Scalars:
    def __init__(self):
        self.logged: set[str] = set()  # names the script has logged itself
        self._pending: Pending = []
        self._taken_at = time.perf_counter()

    def log(self, scalars: dict, moment: Moment) -> None:
        """What the script logs. ValueError for a name that is not free, or for what is no number."""
        for name in scalars:
            if not is_free(name):
                raise ValueError(f"log({name}=…): this name is kept for depthscope's own; choose another.")
        self.logged.update(scalars)
        self._keep(scalars, moment)

    def add(self, scalars: dict, moment: Moment) -> None:
        """The recorder's own, but for those that the script logs itself."""
        self._keep({name: value for name, value in scalars.items() if name not in self.logged}, moment)

    def due(self, now: float) -> bool:
        """Whether they should wait no longer."""
        late = now - self._taken_at > _SECONDS
        return len(self._pending) >= _MANY or bool(self._pending and late)

    def take(self) -> Pending:
        """Those that wait, in the order in which they came."""
        pending, self._pending = self._pending, []
        self._taken_at = time.perf_counter()
        return pending

    def _keep(self, scalars: dict, moment: Moment) -> None:
        for name, value in scalars.items():
            self._pending.append((name, moment, _number(name, value)))


def is_free(name: str) -> bool:
    """Whether a script may log a scalar under this name."""
    return not (metric(name).axes or name.endswith(".step") or name.startswith("__"))


def _number(name: str, value: object) -> float | Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"log({name}=…) takes a single real number, not a {value.dtype} tensor of {value.numel()}."
            )
        # A copy: the tensor's memory may be reused before it is fetched.
        return value.detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"log({name}=…) takes a number, not {value!r}.") from None
