"""kill -9, full disks, lost permissions: injected into a training script with its real recorder, and judged by the reader
in plain Python, which knows nothing but docs/run-format.md."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

import probes
from probes import checking
from probes import manifest as files
from tests.probes import plain_reader
from tests.probes.crashes import PREEMPTED, STEPS, TROUBLES


def script(*arguments, before=()) -> str:
    command = [*before, sys.executable, "-m", "tests.probes.crashes", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


# kill -9


@pytest.mark.parametrize(
    ("count", "seal_seconds", "longest"),
    [
        (10, 0.05, 1.2),
        pytest.param(160, 0.05, 1.5, marks=(pytest.mark.long, pytest.mark.timeout(3000))),
        pytest.param(40, 2.0, 8.0, marks=(pytest.mark.long, pytest.mark.timeout(3000))),  # as users have it
    ],
)
def test_killed_at_random_moments(count, seal_seconds, longest, tmp_path, capsys):
    """Each run is killed several times and goes on from its last checkpoint, as a preempted job does."""
    script("kill", tmp_path, count, 0, seal_seconds, longest)
    whole = dict(plain_reader.read(tmp_path / "undisturbed" / "run")["loss"])
    losses = [
        loss
        for number in range(count)
        if (loss := judged(tmp_path / f"after {number:03d}", whole)) is not None
    ]
    for folder in sorted(tmp_path.glob("0*")):
        judged(folder, whole)
        run, begun = probes.open_run(folder / "run"), len(plain_reader.attempts(folder / "run"))
        assert run.status == "finished" and len(run.attempts) == begun <= PREEMPTED + 1
        assert not checking.check(folder / "run").defects
        # What is missing is told, and nothing else is said to be missing.
        missing = set(range(run.last_step + 1)) - set(run.steps("loss").tolist())
        assert missing == {step for gap in run.gaps for step in range(gap.first, gap.last + 1)}, run.gaps
    assert losses, "some had begun"
    digests = [len(list(tmp_path.glob(f"{which}/run/**/digest/0*"))) for which in ("0*", "after *")]
    assert digests[0], "they make digests as they go"
    with capsys.disabled():
        print(
            f"\n{count} kills, sealed every {seal_seconds} s: the worst lost {max(losses):.2f} s of training; "
            f"{digests[1]} files of digests beside the killed"
        )


def judged(folder: Path, whole: dict) -> float | None:
    """The run of a killed job is readable, holds every shard that was sealed, and the numbers of a training that nobody
    killed; seconds of training that it lost, None where it had not begun."""
    told = [line.split() for line in (folder / "told").read_text().splitlines()]
    sealed = {words[1]: int(words[2]) for words in told if words[0] == "sealed"}
    if not (folder / "run" / files.MANIFEST).exists():
        assert not sealed
        return None
    for name, crc in sealed.items():
        assert zlib.crc32((folder / name).read_bytes()) == crc, "a sealed shard is lost"
    rows = plain_reader.read(folder / "run")
    for step, value in rows.get("loss", ()):
        assert value == whole[step]
    run = probes.open_run(folder / "run")  # perhaps by a digest that somebody was at work on
    for name in run.metrics:
        assert run.steps(name).tolist() == [step for step, _ in rows[name]]
    assert len(rows) == len(run.metrics) and not any(attempt.doubts for attempt in run.attempts)
    assert not rows or run["loss"].tolist() == [value for _, (value,) in rows["loss"]]
    last = max((step for step, _ in rows.get("hidden_rms", ())), default=-1)
    if told[-1][0] != "killed":
        return 0.0
    # The last step that was completed before the kill and is not there; those of earlier attempts were trained again.
    begun = max((place for place, words in enumerate(told[:-1]) if words[0] == "killed"), default=-1)
    lost = [float(words[2]) for words in told[begun + 1 :] if words[0] == "step" and int(words[1]) > last]
    return float(told[-1][1]) - min(lost, default=math.inf) if lost else 0.0


# Trouble with the disk


@pytest.fixture(scope="module")
def troubles():
    """Every kind of trouble, each in a process of its own: its folder, and by its name what was said."""
    before = ["unshare", "--mount", "--propagation", "private"]
    private = (
        shutil.which("unshare") and subprocess.run([*before, "true"], capture_output=True).returncode == 0
    )
    # Not in pytest's folder, into which another user cannot come.
    with tempfile.TemporaryDirectory() as folder:
        said = script("trouble", folder, before=before if private else ())
        yield Path(folder), {told["name"]: told for told in map(json.loads, said.splitlines())}


@pytest.mark.parametrize("name", [name for name in TROUBLES if name != "unprobed"])
def test_trouble_with_the_disk_changes_no_weight_and_is_said_once(name, troubles):
    folder, told = troubles
    if told[name].get("unable"):
        pytest.skip("this process may not mount, or not become another user")
    assert told[name]["weights"] == told["unprobed"]["weights"]
    warnings = [sentence for sentence in told[name]["said"] if sentence.startswith("WARNING")]
    assert len(warnings) == 1, "while it trains"
    # When it has ended, what nobody will find is told once more, to the step.
    ended = [sentence for sentence in told[name]["ended"] if sentence.startswith("WARNING")]
    place = folder / name / "run"
    found = plain_reader.read(place)
    steps = [step for step, _ in found["loss"]]
    run = probes.open_run(place)
    assert run.steps("loss").tolist() == steps
    missing = set(range(STEPS)) - set(steps)
    if name == "lasting":
        # Nothing could be written any more, not even that; the run says that it has no sign of life.
        assert missing and missing == set(range(max(steps) + 1, STEPS))
        lost = f"{len(missing)} steps, from {min(missing)} to {max(missing)}"
        assert (
            len(ended) == 1
            and f"not recorded: {lost} (the run could not be written (File too large))" in ended[0]
        )
        assert "its end could not be marked" in ended[0]
        return
    assert run.status == "finished" and steps[-1] == STEPS - 1
    # The gap is told, to the step.
    assert missing == {step for gap in run.gaps for step in range(gap.first, gap.last + 1)}
    assert bool(ended) == (name == "forgetful")
    if name == "deleted":
        assert missing and "was deleted while it was recorded. It is made anew" in warnings[0]
        assert all("gone from the folder" in problem for problem in run.problems)
    elif name == "forgetful":
        causes = {gap.cause for gap in run.gaps}
        assert (
            causes <= {"the run could not be written (File too large)", "the writer could not keep up"}
            and missing
        )
        assert len(ended) == 1 and sum(map(int, re.findall(r"(\d+) steps?,", ended[0]))) == len(missing)
    else:
        assert not missing and "Training goes on; recording does too when the place is back" in warnings[0]
        assert re.search("INFO: depthscope writes to .* again", "\n".join(told[name]["said"]))
        assert not checking.check(place).defects
