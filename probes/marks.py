"""Marks: an author names a tensor in the model's own forward, where no hook can see it."""

from torch import Tensor

_listening: list = []  # the taps of every model that is recorded now


def mark(x: Tensor, *, state: int | None = None, output: int | None = None) -> Tensor:
    """Record `x` [B, T, D] as the state that layer `state` receives, or as what layer `output` adds; returns `x`.

    Layers count from 1. State L+1 is the final state, output 0 the embedding. In a model that nobody records this does
    nothing. What a recorder sees by itself stays as it is: marks fill the other rows, and all of them in a model
    recorded with `probes.record(model, path, layers=L)`. ValueError unless one of the two is given.
    """
    if (state is None) == (output is None):
        raise ValueError("mark(x, state=l) or mark(x, output=l): give one of the two.")
    place, row = ("state", state - 1) if state is not None else ("output", output)
    for taps in _listening:
        taps.marked(x, place, row)
    return x


def listen(taps: object) -> None:
    """Hand marks to `taps.marked` from now on."""
    _listening.append(taps)


def forget(taps: object) -> None:
    """Undo `listen`; nothing happens where it was not called."""
    _listening[:] = [each for each in _listening if each is not taps]
