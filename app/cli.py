"""The command line: `depthscope dash runs/` opens the dashboard. Importing it is quick and needs no torch."""

from pathlib import Path

import click

from app.attribute import attribute
from app.bench import bench
from app.check import check
from app.compact import compact
from app.demo import demo
from app.describe import describe
from app.places import Place, opened, shown
from app.server import free, serve
from app.upload import upload


def _say_version(context: click.Context, option: click.Option, asked: bool) -> None:
    if asked:
        from probes.version import version

        click.echo(f"depthscope {version()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Show the version and exit.",
)
def main() -> None:
    """See what depth does to a transformer while it trains."""


@main.command()
@click.argument("folders", nargs=-1, type=Place())
@click.option(
    "--port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Local port to serve on."
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
def dash(folders: tuple[str | Path, ...], port: int, no_browser: bool) -> None:
    """Open the dashboard on the runs in FOLDERS (default: runs, then sample_runs), or at addresses like s3://bucket/runs."""
    for folder in folders:
        if not (place := opened(folder)).is_dir():
            raise click.ClickException(f"There is no folder {shown(place)}: give a folder that holds runs.")
    if not free(port):
        raise click.ClickException(f"Port {port} is in use: choose another with --port.")
    serve(folders, port, browser=not no_browser)


main.add_command(demo)
main.add_command(bench)
main.add_command(describe)
main.add_command(check)
main.add_command(compact)
main.add_command(attribute)
main.add_command(upload)


if __name__ == "__main__":
    main()
