"""The benchmarks of writing and reading run, at sizes that prove nothing."""

import json

import pytest
from click.testing import CliRunner

from app.cli import main
from benchmarks import long_run, reader, rivals, writer


def test_the_reader_finds_the_spike_in_every_picture(tmp_path):
    path = tmp_path / "run"
    size = long_run.make(path, 400, 4)
    assert CliRunner().invoke(main, ["compact", str(path)]).exit_code == 0
    for file in path.rglob("*.safetensors"):
        file.read_bytes()
    assert 0 <= reader.forget(path) <= 1
    (path / "config.txt").write_bytes(bytes(100_000))
    assert reader._cached(path / "config.txt") > 0, "what was just written is in memory"
    found = reader.measure(path)  # it refuses to go on where the spike is missing
    assert set(found) == set(reader.TOLD)
    found["stayed"] = 0.0
    one = {"steps": 400, "bytes": size, "digest": 1, "warm": found, "cold": found, "direct": found}
    assert sum(line.startswith("| 400 |") for line in reader.table([one])) == 3


def test_the_writer_compares_what_can_be_read_back(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    writer.main(["--smoke", "--save", "--out", str(tmp_path / "writer.json")])
    told = json.loads((tmp_path / "writer.json").read_text())
    assert set(told["against"]) == {"depthscope", "TensorBoard"}
    assert [[one["rows"], one["dropped"]] for (one,) in told["rows"]] == [[50, 0], [60, 0]]
    printed = capsys.readouterr().out
    assert "| TensorBoard |" in printed and "| 60 | " in printed
    assert rivals.size(tmp_path) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_dashboards_benchmark_tells_a_table_and_why_there_is_no_server(tmp_path):
    pytest.importorskip("playwright")
    from benchmarks import dashboard

    found = {
        "start": 2.0,
        "pages": {dashboard.title(name): {"open": 1.0, "turn": 0.5} for name in dashboard.PAGES},
        "playback": [{"layers": 24, "ms": 17.0, "frames": 30}],
        "live": [1.0, 3.0],
    }
    told = "\n".join(dashboard.table(found))
    assert "| Depth attention | 1.00 | 0.50 |" in told and "2.00 s, 3.00 s at most of 2." in told
    with (
        pytest.raises(SystemExit, match=r"server ended\. It said:\n(?s:.*)There is no folder"),
        dashboard.served(tmp_path / "none"),
    ):
        pass
