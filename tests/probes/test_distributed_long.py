"""What test_distributed.py shows, with four processes, compiled models, the trainers of others and a dead writer."""

import subprocess
import sys

import numpy as np
import pytest

import probes
from probes import checking
from probes import manifest as files
from tests.probes.ranks_played import HANGS, ROOT, assert_alike, play, told

pytestmark = pytest.mark.long
LONG = [
    "ddp",
    "ddp-masked-accumulate",
    "fsdp",
    "fsdp-masked-accumulate",
    "hsdp",
    "tp-4",
    "sp-4",
    "fsdp_tp",
    "fsdp_sp",
    "1f1b-ddp",
    "gpipe-fsdp-experts",
    "interleaved-fsdp-experts",
    "looped-fsdp",
    "ddp-experts",
]
COMPILED = ["compiled_ddp", "compiled_fsdp", "inductor_ddp", "over_fsdp-plain"]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return play(tmp_path_factory.mktemp("four"), 4, *LONG)


@pytest.mark.parametrize("case", LONG)
def test_every_metric_is_that_of_one_process_of_four(case, four):
    """On a mesh of two by two, what is held twice is counted once."""
    assert_alike(four, case)


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_models_over_processes(case, tmp_path):
    assert_alike(play(tmp_path, 2, case), case)


def test_trainers_of_others_under_torchrun(tmp_path):
    """Hugging Face's Trainer, its models, Accelerate and Lightning: two processes record what one does."""
    for library in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(library)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how, world in ((launch, 2), ([], 1)):
        script = ["-m", "tests.probes.ranks_trainers", str(tmp_path / f"{world}"), f"{world}"]
        command = [sys.executable, *how, *script]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANGS)
        assert done.returncode == 0, done.stdout + done.stderr
    ways = {way: ["DistributedDataParallel"] for way in ("trainer", "accelerate", "lightning")}
    for name, by in (ways | {"sharded": ["fully_shard"], "sliced": []}).items():
        run, alone = (probes.open_run(tmp_path / world / name) for world in "21")
        assert run.manifest.ranks.parallel["by"] == by
        assert run.metrics == alone.metrics and run.ranks[1] == ("finished", "") and not run.problems
        assert run.steps("hidden_rms").tolist() == [0, 1, 2]
        for metric in set(run.manifest.ranks.merged) & set(run.metrics):
            atol = 1e-6 if metric in ("identity_error", "depth_attribution") else 1e-7
            np.testing.assert_allclose(run[metric], alone[metric], rtol=1e-5, atol=atol, err_msg=metric)


def test_what_was_sealed_outlives_the_process_that_writes(tmp_path, monkeypatch):
    play(tmp_path, 2, "headless")
    assert told(tmp_path, "headless", 1)["steps"] == 8
    monkeypatch.setattr(files, "SILENT_SECONDS", 0)
    run = probes.open_run(tmp_path / "headless")
    assert run.status == "stopped" and run.ranks[1] == ("finished", "")
    # Step 2 was not sealed yet: until the next one is recorded, the script may still log of it.
    assert run.steps("hidden_rms").tolist() == [0, 1] and not checking.check(run.path).defects
