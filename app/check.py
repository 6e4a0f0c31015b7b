"""`depthscope check RUN…`: is every byte of a run as it was written? `--repair` puts damaged shards aside."""

from pathlib import Path

import click

from app.places import Place, nothing_in, opened


@click.command()
@click.argument("folders", nargs=-1, required=True, type=Place())
@click.option(
    "--repair",
    "mend",
    is_flag=True,
    help="Move damaged shards into a quarantine inside the run, and delete digests that do not fit.",
)
def check(folders: tuple[str | Path, ...], mend: bool) -> None:
    """Verify every byte of the runs at or below FOLDERS, or at addresses like s3://bucket/runs, and explain what is wrong.

    The exit code is 1 when anything is wrong and not repaired. A repair moves shards that cannot be trusted, which no
    reader uses, deletes digests that do not fit their shards, and touches nothing else.
    """
    from probes import checking, elsewhere
    from probes.run import find_runs

    wrong = False
    for place in folders:
        if mend and not isinstance(place, Path):
            raise click.ClickException(
                "--repair works on this machine: copy the runs here, repair the copy, and put it in the place of them."
            )
        folder = opened(place)
        paths = find_runs(folder)
        if not paths:
            raise click.ClickException(nothing_in(folder))
        for path in paths:
            found = checking.check(path)
            if trouble := elsewhere.trouble(path):  # what could not be fetched is no defect of the run
                raise click.ClickException(f"{trouble} Check again when it does.")
            click.echo(found)
            if found.defects and mend:
                try:
                    for sentence in checking.repair(found):
                        click.echo(f"  {sentence}")
                except OSError as error:
                    raise click.ClickException(
                        f"{path} cannot be repaired: {error.strerror or error}."
                    ) from error
                found = checking.check(path)
                click.echo(found)
            wrong |= bool(found.defects)
    if wrong:
        raise click.exceptions.Exit(1)
