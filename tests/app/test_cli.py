"""The command line says in one sentence what is wrong, and never shows a traceback."""

import socket

import click
import pytest
from click.testing import CliRunner

from app import cli


def ran(*arguments: str):
    return CliRunner().invoke(cli.main, list(arguments))


def test_a_missing_folder(tmp_path):
    result = ran("dash", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert (
        result.output == f"Error: There is no folder {tmp_path / 'nowhere'}: give a folder that holds runs.\n"
    )


def test_a_busy_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = ran("dash", str(tmp_path), "--port", str(port))
    assert result.exit_code == 1
    assert result.output == f"Error: Port {port} is in use: choose another with --port.\n"


@pytest.mark.parametrize("port", ["0", "99999", "http"])
def test_a_port_that_is_none(port):
    assert ran("dash", "--port", port).exit_code == 2


def test_it_serves_this_machine_only(tmp_path, monkeypatch):
    from streamlit.web import cli as streamlit

    given = []
    monkeypatch.setattr(streamlit, "main", lambda args, **kwargs: given.extend(args))
    result = ran("dash", str(tmp_path), "--port", "8765", "--no-browser")
    assert result.exit_code == 0
    settings = dict(zip(given[2:-2:2], given[3:-2:2], strict=True))
    assert settings["--server.address"] == "127.0.0.1"
    assert settings["--browser.gatherUsageStats"] == "false"
    assert settings["--server.headless"] == "true"
    assert given[-2:] == ["--", str(tmp_path)]


def test_other_commands_can_join():
    assert isinstance(cli.main, click.Group)
