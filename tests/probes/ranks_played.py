"""Play cases and scenes of `ranks_at_work`, and compare what was recorded."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

import probes
from probes.sampled import SAMPLED_METRICS

ROOT = Path(__file__).parents[2]
HANGS = 900  # seconds
DEPTH = {"depth_weight", "depth_weight_std", "contribution_rms", "depth_entropy", "query_norm"}


def play(folder: Path, world: int, *cases: str) -> Path:
    command = [sys.executable, "-m", "tests.probes.ranks_at_work", str(folder), str(world), *cases]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = started.communicate(timeout=HANGS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # the processes that it began too
    assert started.returncode == 0, said
    return folder


def told(folder: Path, scene: str, *ranks: int):
    found = [json.loads((folder / f"{scene}.{rank}.json").read_text()) for rank in ranks or range(2)]
    return found if len(found) > 1 else found[0]


def assert_alike(folder: Path, case: str, staged: bool = False) -> None:
    run, alone = probes.open_run(folder / case), probes.open_run(folder / f"{case}-single")
    assert run.status == "finished" and not run.problems
    # Of a pipeline the sources are in other stages; of a plain stream they cannot be told where it is compiled.
    staged = staged or "stages" in run.manifest.ranks.parallel
    untold = {"depth_attribution"} if staged or case == "over_fsdp-plain" else set()
    script = {"loss", "stage"}
    assert set(run.metrics) - script == set(alone.metrics) - untold - script
    assert set(SAMPLED_METRICS) | {"grad_norm", "clip_factor", "param_norm", "update_ratio"} <= set(
        run.metrics
    )
    plain = staged or any(each in case for each in ("sp", "plain", "experts"))
    assert not run.reads or plain or set(run.metrics) >= DEPTH
    for name in (set(run.metrics) & set(alone.metrics)) - {"wall_time", "step_time", "probe_time"}:
        assert run.steps(name).tolist() == alone.steps(name).tolist()
        # What is zero but for rounding has no digits to compare.
        atol = 1e-6 if name in ("identity_error", "depth_attribution") else 1e-7
        np.testing.assert_allclose(run[name], alone[name], rtol=1e-5, atol=atol, err_msg=name)
    squares = run["other_grad_norm"] ** 2 + (run["param_grad_norm"] ** 2).sum(1)
    np.testing.assert_allclose(squares, run["grad_norm"] ** 2, rtol=1e-5)
    np.testing.assert_allclose(run["clip_factor"], 0.25, rtol=1e-5)
