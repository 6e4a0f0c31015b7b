"""What tests of several files ask for."""

import pytest

from probes import manifest as files
from probes import writer as writer_module


@pytest.fixture
def hasty(monkeypatch):
    """A writer that seals at every chance."""
    monkeypatch.setattr(writer_module, "SEAL_SECONDS", 0.0)
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.0)
