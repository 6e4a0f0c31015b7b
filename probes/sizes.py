"""Sizes as people write them. Needs no torch."""

import re

from probes.manifest import RunError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def bytes_in(size: str | float, what: str) -> float:
    """Bytes of "8GB", "500 MB", or of their number. Raises RunError, which names `what`, for anything else."""
    if isinstance(size, int | float) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", str(size).strip().lower())
    if found is None:
        raise RunError(f"{what} is {size!r}, which is no size: write it as 8GB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2]])
