"""Runs of every version of the format that there was are read as they were then: tests/golden holds one of each."""

import json
import zlib
from pathlib import Path

import pytest

import probes
from probes.vocabulary import FORMAT_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"


def told(run: probes.Run) -> dict:
    """What a run says, small enough to keep: of each metric its steps, its shape and a CRC-32 of its numbers."""
    series = {
        name: [run.steps(name).tolist(), list(run[name].shape), zlib.crc32(run[name].astype("<f4").tobytes())]
        for name in run.metrics
    }
    labels = [each.label for each in (*run.layers, *run.reads, *run.sources)]
    attempts = [[each.step, each.hidden_from, each.status, each.status_reason] for each in run.attempts]
    return {
        "status": run.status,
        "tags": list(run.tags),
        "labels": labels,
        "attempts": attempts,
        "series": series,
    }


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_run_of_an_older_depthscope_reads_as_it_did(version):
    run = probes.open_run(GOLDEN / f"format-{version}")
    assert run.manifest.format == version
    assert told(run) == json.loads((GOLDEN / f"format-{version}.json").read_text())
    assert not run.problems
