"""What tests of several files ask for."""

import pytest

from probes import elsewhere, remote
from probes import manifest as files
from probes import writer as writer_module
from tests.probes.away import Server


@pytest.fixture
def hasty(monkeypatch):
    """A writer that seals at every chance."""
    monkeypatch.setattr(writer_module, "SEAL_SECONDS", 0.0)
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.0)


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A home of its own for what is fetched and what waits to be sent; nothing known of other addresses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("DEPTHSCOPE_SPOOL", str(tmp_path / "home" / "spool"))
    monkeypatch.setattr(remote, "_shadows", {})
    monkeypatch.setattr(remote, "_cache", None)
    monkeypatch.setattr(elsewhere, "_shadows", {})
    return tmp_path / "home"


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server on loopback."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
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
