"""The benchmark runs, and its table has what it promises. Its times are nobody's business here."""

import argparse
import json
import re

import pytest
import torch

from benchmarks import attnres as benchmark
from benchmarks import calls


def test_a_smoke_run_prints_and_keeps_both_tables(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    always = ["--smoke", "--modes", "eager", "--device", "cpu", "--threads", "1", "--save", "here"]
    always += ["--dtype", "bfloat16", "--heads", "4", "--texts", "2", "--profile"]
    remarks = benchmark.REMARKS + "\nWritten by hand.\n"
    (tmp_path / "here.md").write_text("# old tables\n" + remarks)
    for workload in ("training", "generation"):
        benchmark.main([*always, "--workloads", workload, "--schedules", "no_stack", "stack", "fla"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "fla is not installed here or not right on cpu, so it is not in the tables." in printed
    assert re.findall(r"^eager (training step|generation), 2 rounds", printed, re.M) == [
        "training step",
        "generation",
    ]
    page = (tmp_path / "here.md").read_text()
    assert page.endswith(remarks) and "old tables" not in page
    kept = json.loads((tmp_path / "here.json").read_text())
    assert list(kept) == ["eager training step", "eager generation"]
    for title, each in kept.items():
        ours = [row for row in each["table"] if not row["name"].startswith("attn-res")]
        assert [row["name"] for row in ours] == [
            "PreNorm", "Full, no_stack", "Full, stack", "Block, no_stack", "Block, stack",
        ]  # fmt: skip
        assert ours[0]["ratio"] == 1.0
        profiled = each["profile"]["Full, stack"]
        assert all(row["ms"] > 0 and row["calls"] > 0 for row in profiled)
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


@pytest.mark.long
def test_calls_in_compiled_code_are_counted():
    """One block of width 32, a token of generation."""
    options = argparse.Namespace(blocks=1, width=32, batch=1, context=16)
    (code,) = calls.generation(options, "Block").values()
    found, size = calls.counted(code)
    assert all(found[name] > 0 for name in ("fused", "library", "views", "buffers"))
    assert found["library"] >= 7  # three of queries, keys and values, one of outputs, three of the MLP
    assert size >= 4 * 3 * 32
    assert calls.counted("def call(x):\n a = empty_strided_cpu((2, 3), (3, 1), x)\n cpp_fused_0(a)") == (
        {"fused": 1, "library": 0, "views": 0, "buffers": 1},
        24,
    )


@pytest.mark.long
def test_a_token_of_full_and_block_takes_no_more_calls_than_one_of_prenorm():
    """Their logits, softmax and mix are fused into the kernels that are there anyway."""
    options = argparse.Namespace(blocks=2, width=64, batch=1, context=16)
    found = [calls.counted(calls.generation(options, kind)["token"])[0] for kind in calls.KINDS]
    assert len({(each["fused"], each["library"]) for each in found}) == 1
