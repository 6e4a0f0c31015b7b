"""The benchmark runs, and its table has what it promises. Its times are nobody's business here."""

import json
import re

import pytest
import torch

from benchmarks import attnres as benchmark


def test_a_smoke_run_prints_and_keeps_both_tables(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    always = ["--smoke", "--modes", "eager", "--device", "cpu", "--threads", "1", "--save", "here"]
    for workload in ("training", "generation"):
        benchmark.main([*always, "--workloads", workload, "--schedules", "no_stack", "stack"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert re.findall(r"^eager (training step|generation), 2 rounds", printed, re.M) == [
        "training step",
        "generation",
    ]
    kept = json.loads((tmp_path / "here.json").read_text())
    assert list(kept) == ["eager training step", "eager generation"]
    for title, each in kept.items():
        ours = [row for row in each["table"] if not row["name"].startswith("attn-res")]
        assert [row["name"] for row in ours] == [
            "PreNorm", "Full, no_stack", "Full, stack", "Block, no_stack", "Block, stack",
        ]  # fmt: skip
        assert ours[0]["ratio"] == 1.0
        for row in each["table"]:
            low, high = row["quartiles"]
            assert 0 < low <= row["ratio"] <= high
            assert row["peak MiB"] >= 0
        page = (tmp_path / "here.md").read_text()
        assert f"## {title}" in page and each["command"] in page and each["commit"] in page


def test_the_other_package_is_compared_with_ours_of_the_same_kind():
    ours, theirs = (
        benchmark.Contender("Full, no_stack", None),
        benchmark.Contender("attn-res 0.1.0 full", None),
    )
    other = benchmark.Contender("attn-res 0.1.0 block", None)
    ours.seconds, theirs.seconds, other.seconds = [1.0, 2.0, 1.0], [3.0, 8.0, 3.5], [1.0, 1.0, 1.0]
    *_, last = benchmark.tabled([ours, theirs, other])
    assert last["name"] == "attn-res 0.1.0 full over Full, no_stack"
    assert last["ratio"] == 3.5
    assert last["quartiles"] == [3.25, 3.75]


def test_peak_memory_counts_what_is_held_at_once():
    options = benchmark.parsed(["--smoke", "--device", "cpu"])

    def holds_two_of_three():
        first = torch.ones(2**18)
        second = first + 1
        del first
        return second + 1

    holds_two_of_three()
    assert benchmark.peak_memory(holds_two_of_three, options) == pytest.approx(2.0, rel=0.01)
