"""Differences of two runs: profiles at matched steps, a grid of ratios over training, triangles, and a table."""

import numpy as np
import pandas as pd

from app import cells as pictures
from app import frames, match, reading, reads, words
from probes import Run
from probes.vocabulary import OUTPUT, STATE, metric


def relative(frame: pd.DataFrame, run: Run, name: str) -> pd.DataFrame:
    """A profile whose depth runs from 0 to 1."""
    positions = [position for position, _ in frames.places(run.layout, metric(name).axes)]
    first, last = positions[0], positions[-1]
    return frame.assign(depth=(frame["depth"] - first) / max(1, last - first))


def grid(a: Run, b: Run, name: str, way: str) -> pd.DataFrame:
    """step (of a), until, depth (of a), place, value: log2 of b's metric over a's at the matched step, blank without.

    Layers are matched by relative depth, each with the nearest.
    """
    steps, values = frames.series(a, name)
    others, theirs = frames.series(b, name)
    places = frames.places(a.layout, metric(name).axes)
    chosen = (
        np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 150)).round().astype(int))
        if len(steps)
        else []
    )
    rows = []
    into = np.linspace(0, theirs.shape[1] - 1, len(places)).round().astype(int) if len(others) else None
    measures = {run: match.measured(run, way) for run in (a, b)} if way in match.SCALARS else {}
    for i, index in enumerate(chosen):
        second = answer(measures, a, b, int(steps[index]), way)
        at = frames.nearest(others, second) if second is not None else None
        if at is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            ratio = np.log2(theirs[at][into] / values[index])
        until = (
            int(steps[chosen[i + 1]]) if i + 1 < len(chosen) else int(steps[index]) + max(1, a.manifest.every)
        )
        rows.append(
            pd.DataFrame(
                {
                    "step": int(steps[index]),
                    "until": until,
                    "depth": [depth for depth, _ in places],
                    "place": [place for _, place in places],
                    "value": np.where(np.isfinite(ratio), ratio, np.nan),
                }
            )
        )
    columns = ["step", "until", "depth", "place", "value"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def answer(measures: dict, a: Run, b: Run, step: int, way: str) -> int | None:
    """The step of b that matches a step of a."""
    if way not in match.SCALARS:
        return step if step <= b.last_step else None
    steps, values = measures[a]
    at = frames.nearest(steps, step)
    return match.reached(*measures[b], values[at], way) if at is not None else None


def since(run: Run, name: str, step: int) -> pd.DataFrame:
    """step, until, depth, place, value: log2 of a metric over its own profile at `step`, over the whole training."""
    frame = frames.over_training(run, name)
    base = frames.profile(run, "", name, step)
    if frame.empty or base.empty:
        return frame.iloc[:0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(frame["value"].to_numpy(float) / frame["depth"].map(base.set_index("depth")["value"]))
    return frame.assign(value=np.where(np.isfinite(ratio), ratio, np.nan))


def cells(a: Run, b: Run, first: int, second: int, name: str = "depth_weight") -> pd.DataFrame:
    """The cells of the run with fewer columns, with `first`, `second` and `difference`, second less first.

    Where the two have other reads or columns, those of the finer one are put together by relative depth: a column of
    the coarser gets what the finer gives to the same stretch of the depth, a read is compared with the nearest one of
    its kind. Only shares can be added up so; of other metrics nothing comes back then.
    """
    one, other = pictures.cells(a, first, name), pictures.cells(b, second, name)
    if one.empty or other.empty:
        return pd.DataFrame()
    same = pictures.columns(a, name) == pictures.columns(b, name) and len(one) == len(other)
    if same:
        values = [frame[name].to_numpy() for frame in (one, other)]
        return _differing(one, *values)
    if name not in reads.SHARES:
        return pd.DataFrame()
    if len(_spans(a, name)) <= len(_spans(b, name)):
        return _differing(one, one[name].to_numpy(), _gathered(b, second, a, name))
    return _differing(other, _gathered(a, first, b, name), other[name].to_numpy())


def _differing(frame: pd.DataFrame, first: np.ndarray, second: np.ndarray) -> pd.DataFrame:
    return frame.assign(first=first, second=second, difference=second - first)


def _spans(run: Run, name: str) -> np.ndarray:
    """float64 [S, 2]: the stretch of relative depth, 0 to 1, that each column stands for; the embedding's is empty."""
    layers = len(run.layers)
    if name in pictures.RECOVERED:
        ends = [(i - 1, i) for i in range(1, layers + 1)]
    else:
        ends = [(source.first - 1, source.last) for source in run.sources[1:]]
    return np.array([(0, 0), *ends], float) / layers


def _gathered(fine: Run, step: int, coarse: Run, name: str) -> np.ndarray:
    """float64 [cells of coarse]: the shares of `fine` at a step, put together for the reads and columns of `coarse`."""
    steps, values = frames.series(fine, name)
    values = values[frames.nearest(steps, step)].astype(np.float64)
    values = np.where(pictures.exists(fine, name), values, 0)
    mine, theirs = _spans(coarse, name), _spans(fine, name)
    low = np.maximum(theirs[:, None, 0], mine[None, :, 0])
    high = np.minimum(theirs[:, None, 1], mine[None, :, 1])
    length = np.where(theirs[:, 1] > theirs[:, 0], theirs[:, 1] - theirs[:, 0], 1)
    into = np.maximum(high - low, 0) / length[:, None]
    into[0], into[:, 0], into[0, 0] = 0, 0, 1
    gathered = values[_nearest_reads(coarse, fine)] @ into
    there = pictures.exists(coarse, name)
    # A read a little deeper than its counterpart may see a column more: it counts as the newest.
    for row, count in enumerate(there.sum(axis=1)):
        gathered[row, count - 1] += gathered[row, count:].sum()
    return gathered[there]


def _nearest_reads(coarse: Run, fine: Run) -> list[int]:
    """For each read of one run, the row of the other run's read at the same relative depth, of the same kind."""
    found = []
    for row, read in enumerate(coarse.reads):
        at = row / (len(coarse.reads) - 1)
        alike = [r for r, other in enumerate(fine.reads) if other.kind == read.kind] or range(len(fine.reads))
        found.append(min(alike, key=lambda r: abs(r / (len(fine.reads) - 1) - at)))
    return found


def changes(frame: pd.DataFrame, name: str, labels: tuple[str, str], count: int = 8) -> list[str]:
    """ "Layer 9 (attention) reads the embedding: 0.12 in full, 0.33 in block", the largest differences of `cells` first."""
    known = frame.dropna(subset=["difference"])
    largest = known.loc[known["difference"].abs().sort_values(ascending=False).index[:count]]
    verb = "receives" if name in pictures.RECOVERED else "reads"
    return [
        f"{words.capital(words.the(str(row['read'])))} {verb} {words.the(str(row['from']))}: "
        f"{words.number(row['first'])} {labels[0]}, {words.number(row['second'])} {labels[1]}"
        for _, row in largest.iterrows()
    ]


def table(a: Run, b: Run, at: match.Pair, names: tuple[str, str]) -> pd.DataFrame:
    """One row a measure: its value in either run and the difference."""
    rows = []
    whole = ("Step", metric("tokens").title)
    told = [_measures(run, step) for run, step in ((a, at.first), (b, at.second))]
    for name in told[0]:
        x, y = told[0][name], told[1].get(name, np.nan)
        if np.isfinite(x) or np.isfinite(y):
            write = _count if name in whole else words.number
            ratio = words.factor(y / x if x and name != "Step" else np.nan)
            rows.append((name, write(x), write(y), write(y - x), ratio))
    first, second = names
    if first == second:
        first, second = (f"{names[0]}, step {words.step(step)}" for step in (at.first, at.second))
    if first == second:
        second = f"{second} (again)"
    return pd.DataFrame(rows, columns=["Measure", first, second, "Difference", "Ratio"])


def _measures(run: Run, step: int) -> dict[str, float]:
    found: dict[str, float] = {"Step": float(step)}
    for name in ("loss", "val_loss", "tokens", "wall_time", "grad_norm"):
        steps, values = frames.series(run, name)
        index = frames.nearest(steps, step)
        told = metric(name)
        label = f"{told.title} ({told.unit})" if name == "wall_time" else told.title
        found[label] = float(values[index]) if index is not None else np.nan
    for name, label in (("hidden_rms", "Hidden-state RMS"), ("output_rms", "Output RMS")):
        row = _row(run, name, step)
        found[f"{label}, last over first layer"] = row[-1] / row[0] if len(row) and row[0] > 0 else np.nan
    row = _row(run, "output_grad_rms", step)
    good = len(row) and np.isfinite(row).all() and row.min() > 0
    found["Output gradient RMS, max/min"] = row.max() / row.min() if good else np.nan
    found["Output gradient RMS, CV"] = row.std() / row.mean() if good else np.nan
    last = frames.nearest(reading.steps(run, "depth_weight"), step)
    routing = reads.over_training(run, "", index=np.array([] if last is None else [last], np.int64))
    for name, label in reads.MEASURES.items():
        found[label] = float(routing[name].iloc[-1]) if len(routing) else np.nan
    return found


def _row(run: Run, name: str, step: int) -> np.ndarray:
    """One metric over the layers at the last recorded step up to `step`, the embedding left out."""
    steps, values = frames.series(run, name)
    index = frames.nearest(steps, step)
    if index is None:
        return np.empty(0)
    row = values[index].astype(np.float64)
    return row[1:] if metric(name).axes == OUTPUT else row


def finding(frame: pd.DataFrame, name: str, names: tuple[str, str]) -> str:
    """Where the two differ most at the last matched step."""
    last = frame[frame["step"] == frame["step"].max()].dropna(subset=["value"]) if len(frame) else frame
    noun = words.small(metric(name).title)
    if not len(last):
        return f"{metric(name).title}: nothing to compare"
    most = last.loc[last["value"].abs().idxmax()]
    times = 2 ** abs(float(most["value"]))
    if times < 1.0005:
        return f"{metric(name).title} is the same at every depth"
    # Below a tenth, percents say more than a factor.
    told, than = (
        (f"{100 * (times - 1):.2g}% larger", "than")
        if times < 1.1
        else (f"{words.factor(times)} as large", "as")
    )
    more, less = (names[1], names[0]) if most["value"] > 0 else names
    where = words.the(
        str(most["place"]).removeprefix("into ") if metric(name).axes == STATE else str(most["place"])
    )
    return f"{noun[:1].upper()}{noun[1:]} differs most at {where}: {told} in {more} {than} in {less}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "–"
