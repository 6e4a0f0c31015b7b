"""A soak tells a leak from noise; nobody minds its figures here."""

import os

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.soak import Sample


def made(leak: float, noise: float = 0.5, minutes: int = 30) -> list[Sample]:
    """Samples every five seconds of a process that grows by `leak` MiB an hour, with noise that lasts for minutes."""
    random, drift, found = np.random.default_rng(0), 0.0, []
    for at in np.arange(0, 60 * minutes, 5.0):
        drift = 0.97 * drift + random.normal(0, 0.24 * noise)
        found.append(Sample("recorder", float(at), 300 + leak * at / 3600 + drift, 7, 3))
    return found


@pytest.mark.parametrize("leak, flat", [(0, True), (-30, True), (5, True), (60, False), (25, False)])
def test_a_leak_is_told_from_noise(leak, flat):
    found, sentence = soak.verdict(made(leak), "recorder", warm=5, tolerance=10)
    assert found == flat and ("not flat" in sentence) != flat
    assert "open files 7, threads 3" in sentence
    minutes = soak.by_minute(made(leak), "recorder")
    slope, half = soak.trend(np.array([*minutes], float), np.array([m["memory"] for m in minutes.values()]))
    assert abs(slope - leak) < 1.5 * half and 0 < half < 20


def test_what_was_watched_for_too_short_is_not_called_flat():
    flat, sentence = soak.verdict(made(0, minutes=6), "recorder", warm=4, tolerance=10)
    assert not flat and "too short" in sentence


def test_a_process_is_looked_at():
    one = soak.look("recorder", os.getpid(), 0.0)
    assert one.memory > 10 and one.files > 2 and one.threads >= 1
    gone = os.fork()
    if not gone:
        os._exit(0)
    while os.waitid(os.P_PID, gone, os.WEXITED | os.WNOWAIT) is None:
        pass
    with pytest.raises(OSError):  # dead, and nobody has asked for its exit code yet
        soak.look("recorder", gone, 0.0)
    os.waitpid(gone, 0)
