"""The benchmark runs, and its table has what it promises. Its times are nobody's business here."""

import re

import pytest
import torch

from benchmarks import attnres as benchmark


def test_a_smoke_run_prints_both_tables(capsys):
    threads = torch.get_num_threads()
    benchmark.main(["--smoke", "--modes", "eager", "--device", "cpu", "--threads", "1"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert re.findall(r"^eager (training step|generation): PreNorm", printed, re.M) == [
        "training step",
        "generation",
    ]
    rows = re.findall(
        r"^(PreNorm|Full|Block).* (\d+\.\d+) +(\d+\.\d+) – (\d+\.\d+) .* s +(\d+\.\d+)$", printed, re.M
    )
    assert len(rows) == 2 * 7
    for name, middle, low, high, peak in rows:
        assert float(low) <= float(middle) <= float(high)
        assert float(peak) >= 0
        assert name != "PreNorm" or float(middle) == 1.0


def test_peak_memory_counts_what_is_held_at_once():
    options = benchmark.parsed(["--smoke", "--device", "cpu"])

    def holds_two_of_three():
        first = torch.ones(2**18)
        second = first + 1
        del first
        return second + 1

    holds_two_of_three()
    assert benchmark.peak_memory(holds_two_of_three, options) == pytest.approx(2.0, rel=0.01)
