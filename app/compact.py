"""`depthscope compact RUN…`: a digest of long runs, by which they open in an instant."""

import contextlib
from pathlib import Path

import click

from app import words
from app.places import Here, nothing_in

ELSEWHERE = (
    "compact writes beside the shards, on this machine: run it where the run lies and copy the digests, or do without: a "
    "recording makes its own, and the dashboard makes one in its cache."
)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=Here(ELSEWHERE))
def compact(folders: tuple[Path, ...]) -> None:
    """Make digests of the runs at or below FOLDERS, by which even a million steps open at once.

    A digest lies beside the shards and takes about two fifths of their size; no shard is touched, and a digest can be
    deleted at any time. A recording that goes on makes its own; what does not fit the shards is made anew.
    """
    from app.glance import Unread
    from probes import RunError, compacting
    from probes.digest import FOLDER
    from probes.ranks import ranks_in
    from probes.run import find_runs

    for folder in folders:
        paths = find_runs(folder)
        if not paths:
            raise click.ClickException(nothing_in(folder))
        for path in paths:
            made, gone = [], []
            try:
                runs = [Unread(path)]
                for rank in filter(None, ranks_in(path)):
                    with contextlib.suppress(RunError):  # check says what is wrong with it
                        runs.append(Unread(path, rank))
                for layout, attempt in [(run.layout, attempt) for run in runs for attempt in run.attempts]:
                    into = attempt.shards / FOLDER
                    gone += compacting.tidy(attempt, into)
                    whole = attempt.status != "running"
                    made += [each.stat().st_size for each in compacting.compact(attempt, layout, into, whole)]
            except RunError as error:
                raise click.ClickException(str(error)) from error
            except OSError as error:
                raise click.ClickException(f"{path} has no digest: {error.strerror or error}.") from error
            said = (
                f"{words.counted(len(made), 'file')} made, {sum(made):,} bytes" if made else "nothing to do"
            )
            click.echo(f"{path}: {said}{f'; {len(gone)} that did not fit deleted' if gone else ''}.")
