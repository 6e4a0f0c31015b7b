"""Safe to leave open: this machine only, nothing told to anybody, names shown as they are written, nothing written."""

import hashlib
import http.client
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app import server
from probes.manifest import RANK_FOLDER
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import PAGES, opened, said

EVIL = "<img src=x onerror=alert(1)>"
TAGS = ("**bold**", "$x^2$", "<script>alert(2)</script>", ":smile:", "[a](http://example.com)")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose name, tags, configuration and logged names try to be something else."""
    root = tmp_path_factory.mktemp("hostile")
    config = {"<b>key</b>": "<script>alert(3)</script>", "note": "$\\alpha$ [b](javascript:alert(4))"}
    told = replace(made.manifest("full", 2, **config), tags=TAGS)
    writer = RunWriter(root / EVIL, told)
    for step in (0, 10):
        rows = [*made.rows("full", told.layout, step), ("<i>speed</i>", step, np.float32(step))]
        writer.put(lambda rows=rows: rows, step)
    writer.close("stopped", "<img src=x onerror=alert(5)> **boom** $e$")
    made.run(root / "other", "prenorm", blocks=2, steps=2)
    return root


@pytest.mark.parametrize("page", PAGES)
def test_text_of_a_run_is_shown_as_it_is_written(hostile, page):
    at = opened(hostile, f"pages_/{page}.py", scalar="<i>speed</i>")
    assert not at.exception
    for element in (*at.markdown, *at.caption, *at.warning, *at.info, *at.subheader):
        told = element.value
        assert not getattr(element.proto, "allow_html", False)
        for piece in (EVIL, "**boom**", "$e$", *TAGS):
            assert piece not in told, told  # each is escaped
    for element in at.get("html"):
        assert EVIL not in element.proto.body and "<img" not in element.proto.body


def test_the_reason_of_a_stop_is_still_readable(hostile):
    assert "Stopped: <img src=x onerror=alert(5)> **boom** $e$." in said(opened(hostile))


@pytest.mark.browser
def test_no_script_of_a_run_is_run(hostile, watched, serve):
    dialogs = []
    watched.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    address = serve(hostile)
    for page in ("", "depth_attention"):
        watched.goto(f"{address}/{page}")
        watched.wait_for_selector(".depthscope-chart :is(canvas, svg)", timeout=30_000)
        box = watched.locator(".depthscope-chart").first.bounding_box()
        for share in (0.1, 0.3, 0.5):  # tooltips, too
            watched.mouse.move(box["x"] + share * box["width"], box["y"] + 0.6 * box["height"])
            watched.wait_for_timeout(100)
        assert watched.locator("img[src='x'], .stMain script").count() == 0
    assert dialogs == []


def test_only_this_machine_is_served_and_nobody_is_told(monkeypatch):
    import streamlit.web.cli

    given = []
    monkeypatch.setattr(streamlit.web.cli, "main", lambda arguments, **_: given.extend(arguments))
    server.serve((Path("runs"),), 8599, browser=False)
    assert given[given.index("--server.address") + 1] == "127.0.0.1"
    assert given[given.index("--browser.gatherUsageStats") + 1] == "false"
    config = (Path(server.__file__).parent / ".streamlit" / "config.toml").read_text()
    assert 'allowedHosts = ["localhost", "127.0.0.1"]' in config and "gatherUsageStats = false" in config


@pytest.mark.browser
def test_another_host_or_origin_is_refused(hostile, serve):
    address = serve(hostile)
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(1)
        other.connect((_own_address(), port))  # bound to the loopback only
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    for headers, status in (
        ({"Host": f"127.0.0.1:{port}", "Origin": address}, 101),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": f"127.0.0.1:{port}", "Origin": "http://evil.example"}, 403),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/_stcore/stream", headers=upgrade | headers)
        assert connection.getresponse().status == status, headers
        connection.close()


def _own_address() -> str:
    """An address of this machine that is not the loopback's; where it has none, one that nobody answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.2"


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", "other/../../secret", "%2e%2e/secret"])
def test_an_address_reaches_no_other_folder(tmp_path, name):
    made.run(tmp_path / "runs" / "mine", "full", blocks=2, steps=1)
    made.run(tmp_path / "secret", "full", blocks=2, steps=1, note="hidden")
    at = opened(tmp_path / "runs", runs=[name], first=name, second=name, focus=name)
    assert not at.exception
    assert "no such run is here" in said(at) and "hidden" not in said(at)
    assert at.multiselect(key="pick runs").options == ["mine"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    made.run(tmp_path / "secret", "full", blocks=2, steps=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    shown = said(opened(tmp_path / "runs"))
    assert "No run is here yet" in shown and "link is a link, and links are not followed" in shown


def test_looking_writes_nothing_into_a_run(folder):
    before = _state(folder)
    for page in PAGES:
        opened(folder, f"pages_/{page}.py")
    assert _state(folder) == before


def _state(folder: Path) -> dict:
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_another_programs_safetensors_files_are_told_or_left_alone(tmp_path):
    from safetensors.numpy import save_file

    made.run(tmp_path / "run", "full", blocks=2, steps=2)
    save_file({"weight": np.ones(3)}, tmp_path / "model.safetensors")
    save_file({"weight": np.ones(3)}, tmp_path / "run" / RANK_FOLDER / "model.safetensors")
    assert "missing" not in said(opened(tmp_path))
    save_file(
        {"weight": np.ones(3)}, tmp_path / "run" / RANK_FOLDER / "000000000020-000000000030.safetensors"
    )
    for page in PAGES:
        at = opened(tmp_path, f"pages_/{page}.py")
        assert not at.exception
        assert "Steps 20 to 30 are missing" in said(at)
    (tmp_path / "models").mkdir()
    save_file({"weight": np.ones(3)}, tmp_path / "models" / "model.safetensors")
    assert "no run" in said(opened(tmp_path / "models")).lower()
