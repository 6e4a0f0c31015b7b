"""Are the sample runs what they say they are? `python sample_runs/check.py [FOLDER]` answers in a line for each.

Unedited: every byte as it was written (what `depthscope check` verifies). Complete: every row that the plan asks for.
Finite: but for the unhealthy run, which must break.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402

import probes  # noqa: E402
from probes.checking import check  # noqa: E402
from sample_runs.plans import Plan, plans  # noqa: E402

VECTORS = ("hidden_rms", "output_rms", "output_grad_rms", "hidden_grad_rms", "param_grad_norm", "grad_norm")
SCALARS = ("loss", "val_loss", "tokens")
MATRICES = ("nonfinite", "mixing_condition", "param_norm")
READS = ("depth_weight", "depth_weight_std", "contribution_rms", "depth_entropy")
UNHEALTHY = "unhealthy"


def main(folder: Path = HERE) -> int:
    wrong = 0
    # The names are the same for every device; which one it was is in the run.
    for name in [plan.name for plan in plans("cpu")]:
        found = faults(folder / name)
        wrong += bool(found)
        more = [f"And {len(found) - 3} more."] if len(found) > 3 else []
        print(f"{name}: {' '.join([*found[:3], *more]) or 'unedited, complete, finite where it should be'}")
    return int(bool(wrong))


def faults(path: Path) -> list[str]:
    """What is wrong with the sample run at `path`, in sentences."""
    try:
        run = probes.open_run(path)
    except probes.RunError as error:
        return [str(error)]
    checked = check(path)
    found = [str(defect) for defect in checked.defects]
    training = run.config.get("training", {})
    plan = next(plan for plan in plans(training.get("device", "cpu")) if plan.name == path.name)
    return found + incomplete(run, plan) + not_finite(run, plan)


def incomplete(run: probes.Run, plan: Plan) -> list[str]:
    """Rows that the plan asks for and the run has not."""
    killed = plan.kill_at is not None
    status, last = ("stopped", plan.kill_at) if killed else ("finished", plan.training.steps - 1)
    found = [] if run.status == status else [f"It is {run.status}, not {status}."]
    reads = plan.schedule.tokens_every is not None
    due = dict.fromkeys(VECTORS, plan.schedule.every)
    due |= dict.fromkeys((*MATRICES, *(READS if reads else ())), plan.schedule.matrices_every)
    if UNHEALTHY in plan.tags:
        del due["mixing_condition"]  # of what is not finite there is none
    due |= {"loss": 1, "tokens": 1, "val_loss": plan.schedule.validate_every}
    for name, every in due.items():
        if name not in run:
            found.append(f"It has no {name}.")
        elif missing := sorted(set(range(0, last + 1, every)) - set(run.steps(name).tolist())):
            found.append(f"{name} lacks {len(missing)} steps, the first is {missing[0]}.")
    snapshots = set(range(0, last + 1, plan.schedule.tokens_every)) if reads else set()
    if lacking := snapshots - set(run.token_steps.tolist()):
        found.append(f"It has no token snapshot of step {min(lacking)}.")
    if missing := [part for part in ("training", "corpus", "sample") if part not in run.config]:
        found.append(f"Its configuration lacks {', '.join(missing)}.")
    return found


def not_finite(run: probes.Run, plan: Plan) -> list[str]:
    """Values that are not finite, or of the unhealthy run that all are."""
    if UNHEALTHY in plan.tags:
        broken = "nonfinite" in run and run["nonfinite"].any()
        return [] if broken else ["It never broke: every state is finite."]
    names = [name for name in (*VECTORS, *SCALARS, "nonfinite") if name in run]
    found = [f"{name} is not finite." for name in names if not np.isfinite(run[name]).all()]
    if "nonfinite" in run and run["nonfinite"].any():
        found.append("States hold values that are not finite.")
    if "depth_weight" in run:
        sums = np.nansum(run["depth_weight"], axis=-1)
        if not np.allclose(sums, 1, atol=5e-3):  # float16 in the file
            found.append(f"A read's weights sum to {sums.flat[np.abs(sums - 1).argmax()]:.4f}, not to one.")
    return found


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
