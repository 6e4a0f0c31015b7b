"""Recovered mixing: what each state is made of, solved from a sample of tokens, whatever the architecture.

Per token, the weights a that bring Σ a_i v_i nearest to the state h in least squares, over the sources v_i that it may
read. `definition` says it plainly; `recover` solves all states of a token from one factorisation, for those of state l
are the leading sources of state l+1. It runs in the writer's thread, on the host: factorisations make a GPU wait for
them, and training for the GPU.
"""

import numpy as np

MIXING_METRICS = ("mixing_weight", "mixing_share", "mixing_r2", "mixing_condition")

# With more sources than this share of the channels, rounding alone is explained well, by weights that mean nothing.
SHARE_OF_WIDTH = 4
# How far rounding may move a weight that is shown, where the stream is of 32 bits and of 16.
_TOLERANCE, _TOLERANCE_16 = 1e-4, 2e-2
_AT_ONCE = 2**18  # elements that are held in float64 at a time
_RIDGE = 1e-13  # keeps the factorisation of sources that depend on each other going; their weights are blank


def definition(state: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """One state [D] of one token from its sources [k, D], in float64: weights [k], shares [k], r2 and condition.

    The share of a source is a_i⟨v_i, h⟩/‖h‖²; they sum to r2 = 1 − ‖h − Σ a_i v_i‖²/‖h‖². The condition is that of
    the sources scaled to length one, ‖V‖‖V⁺‖/k in Frobenius norms: 1 where they are at right angles, infinite where
    one is a sum of others. It is the factor (in root mean square) by which it magnifies the errors of the weights.
    """
    state, sources = state.astype(np.float64), sources.astype(np.float64)
    size = np.linalg.norm(sources, axis=1)
    unit = sources / size[:, None]
    weight = np.linalg.lstsq(unit.T, state)[0] / size
    rest = state - weight @ sources
    share = weight * (sources @ state) / (state @ state)
    r2 = 1 - rest @ rest / (state @ state)
    condition = np.linalg.norm(unit) * np.linalg.norm(np.linalg.pinv(unit)) / len(sources)
    return weight, share, r2, condition


def recover(
    states: np.ndarray, outputs: np.ndarray, given: np.ndarray, eps: np.ndarray
) -> dict[str, np.ndarray]:
    """The mixing metrics of `states` [L+1, T, D] and `outputs` (source 0..L) [L+1, T, D] of the same T tokens.

    State l may read its first `given[l]` sources; `eps` [L+1] is the machine epsilon of what it was computed in. Means
    over tokens, of the condition the median. Tokens with a value that is not finite are left out, and rows that are
    NaN throughout count as not seen. Blank (NaN) is a state that was not seen, or one of whose sources was not, or that
    has more sources than a quarter of the width; a weight or share that rounding could have moved by more than 1e-4 (in
    16 bits: 2e-2), for its source is tiny or the condition bad; a weight that what the sources leave unexplained of the
    state could have moved as far, for it is no mix of them then; the weight of a source that is zero at half of the
    tokens or more (elsewhere the mean is over the others). At a token whose state is zero, sources that are not have the
    weight zero.
    """
    rows, _, width = states.shape
    unseen = np.isnan(outputs).all((1, 2))
    count = min(int(unseen.argmax()) if unseen.any() else rows, width // SHARE_OF_WIDTH)
    solved = (given <= count) & ~np.isnan(states).all((1, 2))
    blank = {name: np.full(rows, np.nan, np.float32) for name in MIXING_METRICS}
    blank |= {name: np.full((rows, rows), np.nan, np.float32) for name in MIXING_METRICS[:2]}
    v, h = outputs[:count].swapaxes(0, 1), states[solved].swapaxes(0, 1)
    whole = np.isfinite(v).all((1, 2)) & np.isfinite(h).all((1, 2))
    v, h, given = v[whole], h[whole], given[solved]
    if not h.size:
        return blank
    size = max(1, _AT_ONCE // (v[0].size + h[0].size))
    parts = [_solved(v[i : i + size], h[i : i + size], given) for i in range(0, len(v), size)]
    weight, share, r2, condition, moved, length = (np.concatenate(part) for part in zip(*parts, strict=True))
    noise = np.maximum.accumulate(eps)[solved, None]
    # More than rounding at every sum may leave is something else, which need not be at random.
    rest = np.sqrt(np.clip(1 - r2, 0, None))[:, :, None]
    with np.errstate(invalid="ignore"):
        other = np.where(rest > noise / 2 * np.sqrt(given)[:, None], rest, 0) * moved
    limit = np.where(noise > 1e-5, _TOLERANCE_16, _TOLERANCE)
    # Every sum on the way rounds once more, and of what rounding does only as much is seen as there are channels of it
    # in the span of the sources. A quarter of the epsilon is its standard deviation.
    moved *= noise / 4 * np.sqrt(given / width)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        far, astray = moved / length, other / length  # infinitely far for a source that is zero
    # Of sources that are not zero a state that is, as where dropout took all weights, surely has nothing.
    far, astray = (np.where(np.isposinf(length), 0, each) for each in (far, astray))
    places = np.ix_(solved, np.arange(count))
    exists = np.arange(count) < given[:, None]
    blank["mixing_weight"][places] = np.where(exists, _mean(weight, far, limit, astray), np.nan)
    blank["mixing_share"][places] = np.where(exists, _mean(share, moved, limit), np.nan)
    zero = np.isnan(r2)  # a state that is: there is nothing to explain
    told = np.where(zero, 0, r2).sum(0), (~zero).sum(0)
    blank["mixing_r2"][solved] = np.divide(*told, out=np.full(len(given), np.nan), where=told[1] > 0)
    blank["mixing_condition"][solved] = np.median(condition, 0)
    return blank


def _solved(v: np.ndarray, h: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of tokens [T]: weights and shares [T, l, k], r2 and condition [T, l], the factor from the relative error of a
    state to the error of each share [T, l, k], and the length of each source relative to the state's [T, l, k]."""
    v, h = v.astype(np.float64), h.astype(np.float64)
    products, onto = v @ v.swapaxes(1, 2), v @ h.swapaxes(1, 2)
    length = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
    # A source that is zero is given a direction of its own, where no state has anything.
    scale = np.where(length > 0, length, 1)
    cosines = products / (scale[:, :, None] * scale[:, None])
    diagonal = np.arange(v.shape[1])
    cosines[:, diagonal, diagonal] = 1 + _RIDGE
    onto = onto / scale[:, :, None]
    inverse = np.linalg.inv(np.linalg.cholesky(cosines))  # its leading blocks are those of fewer sources
    reads = np.arange(v.shape[1])[:, None] < given  # [k, l]
    along = np.where(reads, inverse @ onto, 0)
    unit = (inverse.swapaxes(1, 2) @ along).swapaxes(1, 2)
    onto = onto.swapaxes(1, 2)
    square = (h * h).sum(2)
    # Variance inflation of each source beside the others: the diagonal of the inverse of their cosines.
    inflation = np.cumsum(inverse**2, axis=1)[:, given - 1]
    condition = np.sqrt(np.where(reads.T, inflation, 0).sum(2) / given)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = unit * onto / square[:, :, None]
        r2 = (along**2).sum(1) / square
        relative = length[:, None] / np.sqrt(square)[:, :, None]
        weight = unit / length[:, None]
    moved = np.where(square[:, :, None] > 0, np.sqrt(inflation), np.inf)
    return weight, share, r2, condition, moved, relative


def _mean(
    values: np.ndarray, deviation: np.ndarray, limit: np.ndarray, astray: np.ndarray | float = 0.0
) -> np.ndarray:
    """Mean over tokens [T, ...]; NaN where three of its standard deviations are more than `limit`, or all that may lead
    `astray` is, on average.

    Tokens at which nothing is known, for the source is zero there, are left out if they are fewer than half. No others
    are: those that are hard to tell have other weights than the rest.
    """
    known = np.isfinite(deviation)
    total = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(0) / total
        spread = np.sqrt((np.where(known, deviation, 0) ** 2).sum(0)) / total
        bias = np.where(known, astray, 0).sum(0) / total
    return np.where((2 * total > len(values)) & (3 * spread <= limit) & (bias <= limit), mean, np.nan)
