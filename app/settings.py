"""Settings: configurations of runs as flat tables, and where they differ."""

from collections.abc import Mapping, Sequence

NONE = "–"  # a run without this entry


def flat(config: Mapping, prefix: str = "") -> dict[str, str]:
    """Entry and value of a configuration as text; an entry within another has a dotted name: "training.batch"."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = str(value)
    return found


def together(configs: Sequence[Mapping], only_differing: bool = True) -> dict[str, list[str]]:
    """For each entry, in order of appearance, its value in every configuration; all entries, or those not the same in all."""
    tables = [flat(config) for config in configs]
    entries = dict.fromkeys(entry for table in tables for entry in table)
    found = {entry: [table.get(entry, NONE) for table in tables] for entry in entries}
    return {entry: told for entry, told in found.items() if not only_differing or len(set(told)) > 1}
