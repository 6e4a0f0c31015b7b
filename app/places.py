"""Folders as a command line names them: of this machine, or by an address like s3://bucket/runs. Importing this is quick."""

import os
from pathlib import Path

import click


class Place(click.ParamType):
    """A folder: a path, or the address of one elsewhere as it was given."""

    name = "folder"

    def convert(self, value, param, context):
        return value if isinstance(value, Path) or "://" in value else Path(value)


class Here(click.ParamType):
    """A folder of this machine; for an address one sentence on what to do."""

    name = "folder"

    def __init__(self, instead: str):
        self._instead = instead

    def convert(self, value, param, context):
        if not isinstance(value, Path) and "://" in value:
            raise click.ClickException(self._instead)
        return Path(value)


def opened(place: str | Path) -> Path:
    """The folder to read, which of an address shadows it. Raises ClickException where it cannot be reached."""
    if isinstance(place, Path):
        return place
    from probes import RunError, elsewhere, remote

    try:
        folder = remote.local(place)
    except RunError as error:
        raise click.ClickException(str(error)) from error
    elsewhere.find(folder)
    if not folder.is_dir() and (trouble := remote.troubles()):
        raise click.ClickException(trouble[-1])
    return folder


def nothing_in(folder: Path) -> str:
    """The sentence on a folder that holds no run."""
    return f"There is no run at or below {shown(folder)}: give a run's folder." + (
        f" {led}" if (led := led_away(folder)) else ""
    )


def led_away(folder: Path) -> str:
    """A sentence where something in a folder is a link: runs may well lie where it leads. Empty where nothing is."""
    try:
        links = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink())
    except OSError:
        return ""
    if not links:
        return ""
    from probes.careful import printable

    return (
        f"{printable(folder / links[0])} is a link, and links are not followed: give the folder it leads to."
    )


def shown(folder: Path) -> str:
    """What a folder is called where somebody reads it."""
    from probes import elsewhere

    return elsewhere.shown(folder)
