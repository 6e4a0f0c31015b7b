"""The benchmark counts what was announced and what was made. Its times are nobody's business here."""

import pytest
import torch

from benchmarks import attribution


@pytest.mark.parametrize("method", ["removal", attribution.WHAT_IF])
def test_what_is_announced_is_what_is_made(method):
    before = torch.get_num_threads()
    try:
        options = attribution.parsed(["--smoke", "--threads", "1"])
        told = attribution.measured("Block", method, options)
    finally:
        torch.set_num_threads(before)
    assert told["passes"] == told["made"] > 4 and told["seconds"] > 0 and told["bytes"] > 1e8
    assert attribution.row("Block", method, told).count("|") == 2 + 2 + len(attribution.COLUMNS) - 1
