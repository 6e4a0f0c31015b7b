"""The command line says in one sentence what is wrong, and never shows a traceback."""

import socket
import sys

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


@pytest.mark.parametrize("options", [["--no-browser"], []])
def test_it_serves_this_machine_only(tmp_path, monkeypatch, options):
    from streamlit.web import cli as streamlit

    given, opened = [], []
    monkeypatch.setattr(streamlit, "main", lambda args, **kwargs: given.extend(args))
    monkeypatch.setattr("app.server.open_browser", opened.append)
    result = ran("dash", str(tmp_path), "--port", "8765", *options)
    assert result.exit_code == 0
    assert result.output == "Dashboard: http://127.0.0.1:8765  (Ctrl-C ends it)\n"
    assert opened == ([] if options else [8765])
    settings = dict(zip(given[2:-2:2], given[3:-2:2], strict=True))
    assert settings["--server.address"] == "127.0.0.1"
    assert settings["--browser.gatherUsageStats"] == "false"
    # With a browser too: Streamlit's own way to open one comes with its advertisements, in the terminal and on the pages.
    assert settings["--server.headless"] == settings["--logger.hideWelcomeMessage"] == "true"
    assert given[-2:] == ["--", str(tmp_path)]


BUILD = """
import torch
from attnres import Decoder, DecoderConfig

def build():
    model = Decoder(DecoderConfig(width=16, blocks=1, heads=2, kv_heads=2, context=8, vocabulary=17))
    return model, torch.zeros(1, 8, dtype=torch.long)

def alone(): return build()[0]
def elsewhere(): return build()[0], torch.zeros(1, 8)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The name of a module in the current directory, which is not on the path."""
    name = f"script_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_bench_prints_its_table(script):
    result = ran("bench", f"{script}:build", "--pairs", "2", "--every", "5")
    assert result.exit_code == 0, result.output
    rows = [line.split("  ")[0] for line in result.output.splitlines()[3:]]
    assert rows == [
        "a step with vectors", "a step with matrices", "an unrecorded step", "amortised", "memory held",
    ]  # fmt: skip
    assert result.output.startswith("Decoder, ") and "vectors every 5 steps" in result.output


def test_what_bench_cannot_use(script):
    for target, said in {
        "nowhere:build": "There is no module 'nowhere' in this folder",
        f"{script}:built": f"{script} has no function 'built': did you mean {script}:build?",
        f"{script}:alone": f"{script}:alone gave a model without a batch: return (model, batch).",
        f"{script}:elsewhere": "A training step of Decoder failed: ",
    }.items():
        result = ran("bench", target)
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {said}") and result.output.count("\n") == 1


def test_other_commands_can_join():
    assert isinstance(cli.main, click.Group)
