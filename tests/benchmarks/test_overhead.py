"""The benchmark runs, and its files hold what they promise. Its times are nobody's business here."""

import json

import pytest
import torch

from benchmarks import overhead


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_smoke_run(tmp_path, capsys, threads):
    out = tmp_path / "results" / "overhead.json"
    given = [
        "--smoke",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--contenders",
        "depthscope",
        "item",
        "--check-sync",
        "--profile",
        "--out",
    ]
    overhead.main([*given, str(out)])
    told = json.loads(out.read_text())
    assert told["command"].startswith("python -m benchmarks.overhead --smoke") and told["versions"]["torch"]
    (mode,) = told["modes"].values()
    assert [row["name"] for row in mode["rows"]] == [
        "none", "none, again", "depthscope, vectors at every step", "hooks with .item()",
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in mode["rows"])
    assert mode["notes"] == ["sync check: only on CUDA"]
    assert set(mode["profile"]) == {"none", "depthscope, vectors at every step"}
    assert all(row["ms"] > 0 and row["calls"] > 0 for rows in mode["profile"].values() for row in rows)
    assert [bench["residual"] for bench in told["bench"]] == ["prenorm", "block"]
    page = out.with_suffix(".md").read_text()
    assert "| depthscope, vectors at every step | " in page and "amortised" in page
    printed = capsys.readouterr().out
    assert all(bench["printed"] in printed and bench["printed"] in page for bench in told["bench"])


def test_a_rival_that_is_missing_or_fails_is_said(monkeypatch, threads):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'rival'")

    def failing(*_):
        raise RuntimeError("it does not run here\nat all")

    monkeypatch.setitem(overhead.WAYS, "wandb", ("rival one", missing))
    monkeypatch.setitem(overhead.WAYS, "torchinstruments", ("rival two", failing))
    options = overhead.parsed(["--smoke", "--device", "cpu", "--contenders", "wandb", "torchinstruments"])
    measured = overhead.watched("eager", options)
    assert [row["name"] for row in measured["rows"]] == ["none", "none, again"]
    assert measured["notes"] == [
        "rival one is not installed: No module named 'rival'",
        "rival two failed: it does not run here",
    ]


def test_a_share_is_taken_within_the_round():
    base, row = {"seconds": [1.0, 2.0, 4.0]}, {"seconds": [1.1, 2.4, 5.2]}
    assert overhead.shares(row, base) == pytest.approx((0.15, 0.2, 0.25))
