"""Serve the dashboard on this machine only."""

import contextlib
import os
import socket
import sys
import threading
import time
import urllib.request
import webbrowser
from pathlib import Path

import click

SCRIPT = Path(__file__).with_name("main.py")
HOST = "127.0.0.1"


def free(port: int) -> bool:
    """Whether something can listen on the local port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def open_browser(port: int) -> None:
    """Open the dashboard in the user's browser as soon as it answers; nothing where there is no display."""
    # Without one, what Python finds may be a text browser, which would take over the terminal.
    display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if display or not sys.platform.startswith(("linux", "freebsd")):
        threading.Thread(target=_open_when_up, args=(f"http://{HOST}:{port}",), daemon=True).start()


def _open_when_up(url: str) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
            webbrowser.open(url)
            return
        time.sleep(0.2)


def serve(folders: tuple[str | Path, ...], port: int, browser: bool) -> None:
    """Serve the dashboard on this machine only, until Ctrl-C."""
    # Imported before the server is up, so that the first page does not wait for them.
    import altair  # noqa: F401
    import pandas  # noqa: F401
    import vl_convert  # noqa: F401
    from streamlit.web import cli as streamlit

    from app import vega

    vega.library()

    settings = {
        "server.address": HOST,
        "server.port": port,
        # Otherwise Streamlit advertises itself to whoever looks at the pages, and offers to install things.
        "server.headless": True,
        "server.showEmailPrompt": False,
        "logger.hideWelcomeMessage": True,
        "browser.gatherUsageStats": False,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]
    paths = [str(folder.resolve()) if isinstance(folder, Path) else folder for folder in folders]
    click.echo(f"Dashboard: http://{HOST}:{port}  (Ctrl-C ends it)")
    if browser:
        open_browser(port)
    streamlit.main(["run", str(SCRIPT), *flags, "--", *paths], prog_name="depthscope dash")
