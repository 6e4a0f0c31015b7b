"""What all tests share: how thorough the laws are tried, and the browser."""

import os
import re
import shutil

import pytest
from hypothesis import settings

# `make test` tries a law on few examples, `make test-long` on many.
settings.register_profile("short", max_examples=25, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None)
settings.load_profile("short")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    # A user without root cannot install one; in CI its absence is a fault, and the tests fail.
    if CHROMIUM is None and not os.environ.get("CI"):
        skip = pytest.mark.skip(reason="no chromium here: install one to drive the pages in a browser")
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args):
    return {**browser_type_launch_args, "executable_path": CHROMIUM, "args": FLAGS}


@pytest.fixture
def watched(page):
    """The page, and after the test: no error on its console, no exception, no request to another machine."""
    wrong = []

    def said(message) -> None:
        # A page opened by its own address makes Streamlit look for its server below that address first.
        probing = re.search(r"/\w+/_stcore/(health|host-config)$", message.location.get("url", ""))
        if message.type == "error" and not probing:
            wrong.append(message.text)

    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: _local(request.url) or wrong.append(f"fetched {request.url}"))
    yield page
    assert page.locator('[data-testid="stException"]').count() == 0
    assert wrong == []


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A home of its own for what is fetched and what waits to be sent; nothing known of other addresses."""
    from probes import elsewhere, remote

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("DEPTHSCOPE_SPOOL", str(tmp_path / "home" / "spool"))
    monkeypatch.setattr(remote, "_shadows", {})
    monkeypatch.setattr(remote, "_cache", None)
    monkeypatch.setattr(elsewhere, "_shadows", {})
    return tmp_path / "home"


@pytest.fixture(scope="session")
def s3():
    """An S3-compatible server on loopback."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    from tests.probes.away import Server

    server = Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3, apart, monkeypatch):
    """That server, as this process meets it."""
    import s3fs

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3
