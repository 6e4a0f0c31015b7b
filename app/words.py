"""Numbers and names for people: steps with separators, factors, percentages, markdown-safe names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence


def number(value: float) -> str:
    """Three significant digits, no exponent between 0.001 and 99,999."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{digits}f}"


def step(value: int) -> str:
    return f"{value:,}"


def factor(value: float) -> str:
    """ "14×", "1.3×", "0.62×"."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}×" if value >= 10 else f"{value:.2g}×" if value < 1 else f"{value:.1f}×"


def percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "–"


def size(count: float) -> str:
    """Bytes as "812 KB", "1.4 MB"."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def age(seconds: float) -> str:
    """ "40 s", "12 min", "3 h", "5 days"."""
    for length, unit in ((86_400, " days"), (3600, " h"), (60, " min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f} s"


def counted(count: int, noun: str) -> str:
    """ "1 sequence", "8 sequences"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def joined(parts: Iterable[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    parts = list(parts)
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """A title inside a sentence: "Hidden-state RMS" is "hidden-state RMS"."""
    return text[:1].lower() + text[1:]


def the(label: str) -> str:
    """A label inside a sentence: "the embedding", "the final read", "layer 3 (MLP)"."""
    return f"the {label}" if label in ("embedding", "final read", "final state") else label


def short(label: str) -> str:
    """ "emb.", "final", "12" and, for a depth block, "b3"."""
    if label in ("embedding", "final read"):
        return {"embedding": "emb.", "final read": "final"}[label]
    number = next((word for word in label.split() if word.isdecimal()), label)
    return f"b{number}" if label.startswith("depth block") else number


def plain(text: str) -> str:
    """Text that markdown shows as it is written."""
    return re.sub(r"([\\`*_{}\[\]<>#$~|:])", r"\\\1", text)


LONG = 28  # characters of a name that a sentence can bear


def shortened(names: Sequence[str]) -> dict[str, str]:
    """For each long name what tells it apart from the others, with "…" for what it shares with all of them.

    "llama_full_lr3e-4_seed1337_retry" beside "llama_block_lr3e-4_seed1337_retry" is "…full…". Short names, and those
    that would not be shorter or not be told apart, are left out.
    """
    parts = {name: re.findall(r"[^\W_]+|[\W_]", name) for name in names}
    found = {}
    for name in names:
        if len(name) <= LONG:
            continue
        others = [set(parts[other]) for other in names if other != name]
        own = [part if not all(part in other for other in others) else "…" for part in parts[name]]
        kept = re.sub("…+", "…", "".join(own)) if others else "…"
        if len(kept) < 3 or len(kept) > LONG:
            kept = f"{name[:12]}…{name[-12:]}"
        found[name] = kept
    short = [found.get(name, name) for name in names]
    return {name: kept for name, kept in found.items() if short.count(kept) == 1}


def replaced(text: str, short: Mapping[str, str]) -> str:
    """The text with long names in it shortened, those first that others are a part of."""
    for name in sorted(short, key=len, reverse=True):
        text = text.replace(name, short[name])
    return text
