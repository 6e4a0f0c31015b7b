"""Serve the dashboard on this machine only."""

import socket
from pathlib import Path

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
        "server.headless": not browser,
        "server.showEmailPrompt": False,
        "browser.gatherUsageStats": False,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]
    paths = [str(folder.resolve()) if isinstance(folder, Path) else folder for folder in folders]
    streamlit.main(["run", str(SCRIPT), *flags, "--", *paths], prog_name="depthscope dash")
