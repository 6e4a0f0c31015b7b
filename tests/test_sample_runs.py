"""The sample runs are what they say they are, and the check of that can fail."""

import shutil

import pytest

from probes.shard import read_shard, write_shard
from sample_runs.check import HERE, faults
from sample_runs.plans import plans
from sample_runs.quoted import PAGE, Runs, absent, passages
from sample_runs.record import recorded

NAMES = [plan.name for plan in plans("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_unedited_complete_and_finite(name):
    assert faults(HERE / name) == []


@pytest.mark.parametrize("change", ["a step less", "a byte", "not finite"])
def test_the_check_finds(change, tmp_path):
    run = tmp_path / "prenorm"
    shutil.copytree(HERE / "prenorm", run)
    (path,) = (run / "rank-00000").glob("0*.safetensors")
    if change == "a byte":
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        assert "does not match its checksum" in faults(run)[0]
        return
    shard = read_shard(path)
    rows = {name: values.copy() for name, values in shard.tensors.items()}
    if change == "not finite":
        rows["hidden_rms"][3, 2] = float("nan")
        said = "hidden_rms is not finite"
    else:
        rows["hidden_rms"], rows["hidden_rms.step"] = rows["hidden_rms"][1:], rows["hidden_rms.step"][1:]
        said = "hidden_rms lacks 1 steps, the first is 0"
    path.unlink()
    write_shard(path, rows, shard.metadata)
    assert any(said in sentence for sentence in faults(run))


def test_the_page_quotes_what_the_runs_give():
    """Each figure of docs/sample-runs.md that quoted.py knows, computed anew."""
    wanted = list(passages(Runs(HERE)))
    text = PAGE.read_text()
    assert absent(text, wanted) == []
    assert len(wanted) > 30
    # A figure that is another one is found out, wherever it stands.
    assert absent(text.replace("37 in PreNorm", "38 in PreNorm"), wanted) == [
        passage for passage in wanted if "37 in PreNorm" in passage
    ]


def test_plans_are_told_apart_by_name_and_a_cpu_has_those_of_a_gpu():
    gpu = [plan.name for plan in plans("cuda")]
    assert len({*NAMES}) == len(NAMES) and {*gpu} <= {*NAMES}
    assert all(plan.training.device == "cuda" for plan in plans("cuda"))


def test_a_run_of_another_device_is_to_be_recorded_yet():
    cpu, gpu = plans("cpu")[0], plans("cuda")[0]
    assert cpu.name == gpu.name == "prenorm"
    assert recorded(HERE / "prenorm", cpu) and not recorded(HERE / "prenorm", gpu)
