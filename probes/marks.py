"""Marks: an author names a tensor in the model's own forward, where no hook can see it."""

from torch import Tensor

_listening: list = []  # the taps of every model that is recorded now


def mark(
    x: Tensor, *, state: int | None = None, output: int | None = None, read: int | None = None
) -> Tensor:
    """Record `x` [B, T, D] as the state that layer `state` receives, or as what layer `output` adds; or `x` [S, B, T] as
    the depth weights with which layer `read` weighs the embedding and the outputs before it. Returns `x`.

    Layers count from 1. State L+1 is the final state, read L+1 the final read, output 0 the embedding. Reads are marked
    in a model recorded with `layers=L`, and have as many sources as there are: read l has l. In a model that nobody records this does
    nothing. What a recorder sees by itself stays as it is: marks fill the other rows, and all of them in a model
    recorded with `probes.record(model, path, layers=L)`. ValueError unless one of the three is given.
    """
    if sum(each is not None for each in (state, output, read)) != 1:
        raise ValueError(
            "mark(x, state=l), mark(x, output=l) or mark(weights, read=l): give one of the three."
        )
    if read is not None:
        place, row = "read", read - 1
    else:
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
