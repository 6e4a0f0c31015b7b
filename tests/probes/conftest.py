"""What tests of several files ask for."""

import pytest

from probes import compacting
from probes import manifest as files
from probes import writer as writer_module
from tests.probes import digested


@pytest.fixture
def hasty(monkeypatch):
    """A writer that seals at every chance."""
    monkeypatch.setattr(writer_module, "SEAL_SECONDS", 0.0)
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.0)


@pytest.fixture
def few(monkeypatch):
    """A file of a digest is full with 100 rows of one metric."""
    monkeypatch.setattr(compacting, "ROWS", 100)


@pytest.fixture
def digestible(tmp_path, few):
    """Two attempts, the second from step 200 on; nine shards of 30 steps each in the first, some in the second."""
    return digested.two_attempts(tmp_path / "run")
