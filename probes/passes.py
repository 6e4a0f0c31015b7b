"""Training forwards, and the sums of those that count.

Taps write to one set of live sums. At the end of a backward pass the forwards it went through count: their sums
are added to those of the step. A forward whose backward never runs counts in no step.
"""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from probes.statistics import Tables, clear, merge


@dataclass
class Pass:
    """One eager forward: how often each row was tapped in it, whether a gradient came back to it, and what waits for
    one (edge_taps.py)."""

    watched: bool = False
    reached: bool = False
    mask: Tensor | None = None
    calls: Counter = field(default_factory=Counter)
    edges: object = None

    @property
    def counts(self) -> bool:
        # Compiled taps say nothing about whose gradient has come.
        return self.reached or not self.watched


class Passes:
    """The forwards of one step. `now` is the one whose taps fire."""

    def __init__(self, live: Tables, counted: Tables):
        self._live, self._counted = live, counted
        self.repeated: set[tuple[str, int]] = set()  # rows tapped more than once in a forward
        self.met: list[tuple[str, int]] = []  # rows in the order of an eager forward
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self.now = self._last = Pass()
        self._open = False  # a forward has written to the live sums
        self._waiting: list[tuple[Pass, list[Tensor]]] = []
        self._settled = False  # some backward pass has ended
        self._live.reset()
        self._counted.reset()

    def begin(self) -> None:
        """An eager forward begins. What an earlier one summed up waits apart for its backward pass."""
        if self._open:
            sums = self._live.forward_tensors()
            self._waiting.append((self._last, [t.clone() for t in sums]))
            clear(sums)
        self.now = self._last = Pass()
        self._open = True

    def commit(self, everything: bool = False) -> None:
        """A backward pass that counts has ended."""
        for sums in self._reached(everything):
            merge(self._counted.forward_tensors(), sums)
        merge(self._counted.backward_tensors(), self._live.backward_tensors())
        clear(self._live.backward_tensors())

    def drop(self) -> None:
        """A backward pass that does not count has ended."""
        for _ in self._reached():
            pass
        clear(self._live.backward_tensors())

    def forget_gradients(self) -> None:
        """A backward pass has ended that reached no parameter: its gradients were for something else."""
        clear(self._live.backward_tensors())
        for passed in (self._last, *(passed for passed, _ in self._waiting)):
            passed.reached = False

    def restart(self) -> None:
        """Nothing counts of what was committed in this step."""
        self._counted.reset()

    def settle(self) -> None:
        """The step is complete: where no backward pass was seen to end, what there is counts."""
        self._note_repeats()
        if not self._settled:
            self.commit(everything=True)

    def _reached(self, everything: bool = False):
        """Sums of the forwards whose gradients have come; they are cleared."""
        self._settled = True
        self._note_repeats()
        kept = []
        for passed, sums in self._waiting:
            if everything or passed.counts:
                yield sums
            else:
                kept.append((passed, sums))
        self._waiting = kept
        if everything or self._last.counts:
            sums = self._live.forward_tensors()
            yield sums
            clear(sums)
            self._open = False

    def _note_repeats(self) -> None:
        self.repeated |= {row for row, times in self._last.calls.items() if times > 1}
        self.met = list(self._last.calls) or self.met
