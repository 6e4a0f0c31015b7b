"""`depthscope upload`: send what recordings left behind on this machine to where it belongs."""

from pathlib import Path

import click


@click.command()
@click.argument("spool", required=False, type=click.Path(path_type=Path))
@click.argument("address", required=False)
def upload(spool: Path | None, address: str | None) -> None:
    """Send a recording that was left in SPOOL, a folder of this machine, to ADDRESS (default: where it was to go).

    Without SPOOL all that were left here are sent. What has arrived is removed here.
    """
    from probes import RunError
    from probes.remote import spool as spools
    from probes.remote.uploading import send

    found = [spool] if spool is not None else spools.left()
    if not found:
        click.echo("Nothing is left to upload.")
    failed = False
    for folder in found:
        try:
            if spool is None and spools.recorded(folder):
                click.echo(f"{folder} is being recorded: it is sent as it grows.")
                continue
            click.echo(send(folder, address))
        except (RunError, OSError) as error:
            failed = True
            click.echo(f"{folder}: {error}", err=True)
    if failed:
        raise click.exceptions.Exit(1)
