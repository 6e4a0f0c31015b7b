"""Token reads: the snapshots of followed sequences as frames, for one read token by token, or one token read by read."""

import threading
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import frames, words
from probes import Run, RunError
from probes.tokens import Tokens

LONG = 96  # characters of a line of text at most
_KEPT_MOST, _NUMBERS_MOST = 4_096, 40_000_000  # rows kept; numbers read from the disk for one playback
_MARKS = {"\n": "↵", "\r": "␍", "\t": "→", "\u00a0": " "}

_turn = threading.Lock()
_kept: OrderedDict[tuple, np.ndarray | None] = OrderedDict()


@dataclass(frozen=True)
class Contrast:
    """A source on which one read's tokens differ: the lowest and the highest weight, and the tokens that give them."""

    read: int  # from 1
    source: int  # from 0
    low: float
    high: float
    least: str
    most: str

    def sentence(self, run: Run) -> str:
        """ "Layer 9 (attention) reads layer 4 (MLP) with 0.03 at “x” and 0.41 at “def”"."""
        read = words.capital(words.the(run.reads[self.read - 1].label))
        source = words.the(run.sources[self.source].label)
        return f"{read} reads {source} with {self.low:.2f} at {self.least} and {self.high:.2f} at {self.most}"


def snapshot(run: Run, step: int) -> Tokens:
    """The snapshot of the last step up to `step` that has one, else the first. Raises KeyError, RunError as `Run.tokens`."""
    steps = run.token_steps
    at = frames.nearest(steps, step)
    return run.tokens(int(steps[at or 0]) if len(steps) else None)


def real(told: Tokens, sequence: int) -> np.ndarray:
    """Positions, from 0, of the tokens of a sequence that are no padding."""
    return np.flatnonzero(np.isfinite(told.weight[sequence]).any(axis=(1, 2)))


def texts(told: Tokens, sequence: int) -> list[str]:
    """What stands for each token: its text, else its id, else its position from 1."""
    if told.texts is not None:
        return told.texts[sequence]
    if told.ids is not None:
        return [str(token) for token in told.ids[sequence]]
    return [str(position) for position in range(1, told.weight.shape[1] + 1)]


def quoted(text: str) -> str:
    """A token inside a sentence: “def”, “↵”; a space alone is “␣”."""
    return f"“{seen(text) if text.strip(' ') else '␣' * len(text) or '∅'}”"


def line(told: Tokens, sequence: int, read: int, source: int) -> pd.DataFrame:
    """token (from 1), text, shown, told, weight, and where it stands in lines of 96 characters: line, start, end.

    One row a token that is no padding, with its weight of `read` (from 1) on `source`.
    """
    there = real(told, sequence)
    written = texts(told, sequence)
    shown = [seen(written[position]) for position in there]
    # What is only a number needs a space to be told from the next one.
    apart = 0 if told.texts is not None else 1
    frame = pd.DataFrame(
        {
            "token": there.astype(np.int16) + 1,
            "told": [quoted(written[position]) for position in there],
            "shown": shown,
            "weight": told.weight[sequence, there, read - 1, source].astype(np.float32),
        }
    )
    places = _wrapped(shown, [written[position] for position in there], apart)
    return frame.assign(**{name: np.array(column, np.int16) for name, column in places.items()})


def grid(run: Run, told: Tokens, sequence: int, read: int) -> pd.DataFrame:
    """token (from 1), source, from, told, shown, weight: one row a token and source of one read."""
    there = real(told, sequence)
    count = run.reads[read - 1].sources
    written = texts(told, sequence)
    weight = told.weight[sequence, there, read - 1, :count]
    token = np.repeat(np.arange(len(there)), count)
    source = np.tile(np.arange(count), len(there))
    return pd.DataFrame(
        {
            "token": there[token].astype(np.int16) + 1,
            "source": source.astype(np.int16),
            "from": pd.Categorical.from_codes(source, [one.label for one in run.sources][:count]),
            "told": np.array([quoted(written[position]) for position in there], object)[token],
            "weight": weight.ravel().astype(np.float32),
        }
    )


def cells(run: Run, told: Tokens, sequence: int, token: int) -> pd.DataFrame:
    """One token's own triangle, in the columns of app.cells.cells; `token` counts from 1."""
    there = run.layout.triangle()
    row, column = np.nonzero(there)
    counts = there.sum(axis=1)
    return pd.DataFrame(
        {
            "step": told.step,
            "row": row.astype(np.int16),
            "number": row.astype(np.int16) + 1,
            "read": pd.Categorical.from_codes(row, [read.label for read in run.reads]),
            "source": column.astype(np.int16),
            "from": pd.Categorical.from_codes(column, [source.label for source in run.sources]),
            "sources": counts[row].astype(np.int16),
            "newest": column == counts[row] - 1,
            "depth_weight": told.weight[sequence, token - 1][there].astype(np.float32),
        }
    )


def contrasts(run: Run, told: Tokens, sequence: int, count: int = 6) -> list[Contrast]:
    """The reads whose weight on one source differs most between tokens (by its standard deviation), most first."""
    there = real(told, sequence)
    if len(there) < 2:
        return []
    weight = told.weight[sequence, there].astype(np.float64)
    spread = np.nan_to_num(weight.std(axis=0))  # blank where there is no such source
    source = spread.argmax(axis=1)
    most = spread.max(axis=1)
    written = texts(told, sequence)
    found = []
    for read in np.argsort(-most, kind="stable")[:count]:
        if most[read] < 1e-4:  # the same for every token
            break
        course = weight[:, read, source[read]]
        ends = [quoted(written[there[at]]) for at in (course.argmin(), course.argmax())]
        found.append(Contrast(int(read) + 1, int(source[read]), course.min(), course.max(), *ends))
    return found


def played(run: Run, sequence: int, read: int, rows: int) -> tuple[list[int], np.ndarray]:
    """Steps, and the weights of one read at each of them: float32 [step, token, source], padding left out.

    As many snapshots as can be sent along and read in a moment, ends kept; what cannot be read is left out.
    """
    steps = [int(step) for step in run.token_steps]
    if not steps:
        return [], np.empty((0, 0, 0), np.float32)
    size = max(1, run.layout.triangle().sum() * 256)
    steps = frames.played(frames.thinned(steps, _NUMBERS_MOST // size), rows)
    found = {step: _of_read(run, step, read) for step in steps}
    known = {step: each for step, each in found.items() if each is not None}
    shape = known[max(known)].shape if known else ()
    known = {step: each for step, each in known.items() if each.shape == shape and sequence < len(each)}
    if not known:
        return [], np.empty((0, 0, 0), np.float32)
    values = np.stack([each[sequence] for each in known.values()])
    return list(known), values[:, np.isfinite(values[-1]).any(axis=1)]


def seen(text: str) -> str:
    """A token's text as it can be drawn: line ends and tabs as signs, what cannot be seen as a dot."""
    return "".join(_MARKS.get(sign, "·" if _unseen(sign) else sign) for sign in text) or "∅"


def _unseen(sign: str) -> bool:
    """Control signs and the like, and those that part lines and paragraphs: Vega takes no expression with one of these."""
    kind = unicodedata.category(sign)
    return kind[0] == "C" or kind in ("Zl", "Zp")


def _of_read(run: Run, step: int, read: int) -> np.ndarray | None:
    """float32 [sequence, token, source] of one read at one step, kept; None where the snapshot cannot be read."""
    key = (run.path, run.manifest.created, len(run.attempts), step, read)
    with _turn:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    try:
        found = run.tokens(step).weight[:, :, read - 1, : run.reads[read - 1].sources].astype(np.float32)
    except (RunError, KeyError):
        found = None
    with _turn:
        _kept[key] = found
        while len(_kept) > _KEPT_MOST:
            _kept.popitem(last=False)
    return found


def _wrapped(shown: list[str], written: list[str], apart: int) -> dict[str, list[int]]:
    """Line, start and end of each text; a line ends where it is full, and after a token that ends one."""
    places = {"line": [], "start": [], "end": []}
    at, row = 0, 0
    for drawn, text in zip(shown, written, strict=True):
        wide = min(LONG, sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in drawn))
        if at and at + wide > LONG:
            at, row = 0, row + 1
        for name, value in (("line", row), ("start", at), ("end", at + wide)):
            places[name].append(value)
        at += wide + apart
        if text.endswith("\n"):
            at, row = 0, row + 1
    return places
