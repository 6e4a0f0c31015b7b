"""The command line: `depthscope dash runs/` opens the dashboard. Importing it is quick and needs no torch."""

import socket
from pathlib import Path

import click

SCRIPT = Path(__file__).with_name("main.py")
HOST = "127.0.0.1"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="depthscope")
def main() -> None:
    """See what depth does to a transformer while it trains."""


@main.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Local port to serve on."
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
def dash(folders: tuple[Path, ...], port: int, no_browser: bool) -> None:
    """Open the dashboard on the runs in FOLDERS (default: runs, then sample_runs)."""
    for folder in folders:
        if not folder.is_dir():
            raise click.ClickException(f"There is no folder {folder}: give a folder that holds runs.")
    if not free(port):
        raise click.ClickException(f"Port {port} is in use: choose another with --port.")
    serve(folders, port, browser=not no_browser)


def free(port: int) -> bool:
    """Whether something can listen on the local port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def serve(folders: tuple[Path, ...], port: int, browser: bool) -> None:
    """Serve the dashboard on this machine only, until Ctrl-C."""
    # Imported before the server is up, so that the first page does not wait for them.
    import altair  # noqa: F401
    import pandas  # noqa: F401
    from streamlit.web import cli as streamlit

    settings = {
        "server.address": HOST,
        "server.port": port,
        "server.headless": not browser,
        "server.showEmailPrompt": False,
        "browser.gatherUsageStats": False,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]
    paths = [str(folder.resolve()) for folder in folders]
    streamlit.main(["run", str(SCRIPT), *flags, "--", *paths], prog_name="depthscope dash")


if __name__ == "__main__":
    main()
