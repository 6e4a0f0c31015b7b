"""Steps of two runs are matched by what they had come to; differences are those of the recorded numbers."""

import numpy as np
import pytest

from app import difference, match
from probes import open_run
from probes.manifest import Manifest
from probes.writer import RunWriter
from tests.app import made
from tests.app.test_pages import mounted, opened, plotted, said

NAMES = ("a", "b")


def recorded(path, losses, blocks: int = 2, hidden=None):
    shape = made.layout("prenorm", blocks)
    writer = RunWriter(path, Manifest(shape, 0.0, 1, 1))
    rows = []
    for step, loss in enumerate(losses):
        rows += [("loss", step, np.float32(loss)), ("tokens", step, np.float32(100 * (step + 1)))]
        rows.append(("hidden_rms", step, np.asarray(hidden or np.ones(2 * blocks + 1), np.float32)))
    writer.put(lambda: rows, len(losses))
    writer.close("finished")
    return open_run(path)


def test_a_loss_is_matched_by_the_first_step_that_came_as_low(tmp_path):
    slow = recorded(tmp_path / "slow", np.linspace(5, 3, 41))
    fast = recorded(tmp_path / "fast", np.linspace(5, 1, 41))
    losses = match.measured(slow, "loss")[1]
    found = match.pair(slow, fast, "loss", 30, None, NAMES)
    at = match.measured(fast, "loss")[1]
    assert at[found.second] <= losses[30] < at[found.second - 1]
    latest = match.pair(fast, slow, "loss", None, None, NAMES)
    assert latest.second == 40 and at[latest.first] <= losses[40] < at[latest.first - 1]
    assert match.pair(fast, slow, "loss", 40, None, NAMES).told.startswith(
        "b never came to a mean training loss of "
    )


def test_a_spike_does_not_undo_a_loss(tmp_path):
    run = recorded(tmp_path / "run", [5, 4, 3, 9, 3, 3])
    assert (np.diff(match.measured(run, "loss")[1]) <= 0).all()


def test_steps_tokens_and_own_steps(tmp_path):
    a, b = recorded(tmp_path / "a", [3] * 30), recorded(tmp_path / "b", [3] * 20)
    found = match.pair(a, b, "step", None, None, NAMES)
    assert (found.first, found.second) == (19, 19)
    found = match.pair(a, b, "tokens", None, None, NAMES)
    assert (found.first, found.second) == (19, 19)
    found = match.pair(a, b, "own", 4, 7, NAMES)
    assert (found.first, found.second) == (4, 7)
    assert "loss" not in match.ways(a, a) and "time" not in match.ways(a, b)


def test_ratios_are_those_of_matched_rows_and_relative_depths(tmp_path):
    a = recorded(tmp_path / "a", [3] * 4, blocks=1, hidden=[1, 2, 4])
    b = recorded(tmp_path / "b", [3] * 4, blocks=2, hidden=[2, 9, 2, 9, 32])
    grid = difference.grid(a, b, "hidden_rms", "step")
    last = grid[grid["step"] == 3]
    assert last["value"].tolist() == pytest.approx([1, 0, 3])
    told = difference.finding(grid, "hidden_rms", NAMES)
    assert told == "Hidden-state RMS differs most at the final state: 8.0× as large in b as in a"


def test_the_page_overlays_matched_profiles(folder):
    at = opened(folder, "pages_/compare.py", runs=["prenorm", "full"], by="step", step="100")
    assert not at.exception and "Both at step 100" in said(at)
    _, (frame,) = plotted(at)[0]
    for name in ("prenorm", "full"):
        run = open_run(folder / name)
        row = run["hidden_rms"][run.steps("hidden_rms").tolist().index(100)]
        assert frame.loc[frame["run"] == name, "value"].to_numpy() == pytest.approx(row)
    assert len(at.dataframe) == 1


def test_the_difference_scale_has_zero_in_its_middle(folder):
    at = opened(folder, "pages_/compare.py", runs=["prenorm", "full"])
    signals = mounted(at, "depthscope_chart")[1]["signals"]
    assert signals["now_color_domain_0"] == -signals["now_color_domain_1"] < 0


def test_two_steps_of_one_run(folder):
    at = opened(
        folder,
        "pages_/compare.py",
        runs=["full"],
        first="full",
        second="full",
        by="own",
        step="200",
        other="50",
    )
    assert not at.exception and "full at step 200, full at step 50" in said(at)
    _, (frame,) = plotted(at)[0]
    assert frame["step"].unique().tolist() == [200, 50] and frame["run"].nunique() == 2
    told = mounted(at, "depthscope_chart")[-1]["alt"]
    assert told.startswith("Depth weight differs most where layer") and "at step 50," in told
    run = open_run(folder / "full")
    _, (grid,) = plotted(at)[1]
    hidden, steps = run["hidden_rms"], run.steps("hidden_rms").tolist()
    shown = grid.loc[grid["step"] == 200, "value"].to_numpy()
    assert shown == pytest.approx(np.log2(hidden[steps.index(200)] / hidden[steps.index(50)]), abs=1e-5)
    cells = plotted(at)[-1][1][0]
    weight, when = run.layout.pack(run["depth_weight"]), run.steps("depth_weight").tolist()
    assert cells["difference"].to_numpy() == pytest.approx(weight[when.index(200)] - weight[when.index(40)])


def test_shares_of_other_depths_are_put_together(tmp_path):
    """Twice as many layers: a column of the shorter run is two of the longer one’s; nothing is lost."""
    short = open_run(made.run(tmp_path / "short", "full", blocks=2, steps=3))
    long = open_run(made.run(tmp_path / "long", "full", blocks=4, steps=9))
    cells = difference.cells(short, long, 20, 80)
    assert len(cells) == 15 and (cells["difference"] == cells["second"] - cells["first"]).all()
    assert cells.groupby("row")["second"].sum().tolist() == pytest.approx([1] * 5)
    final = cells[cells["row"] == 4]["second"].to_numpy()
    last = long["depth_weight"][long.steps("depth_weight").tolist().index(80), -1]
    assert final == pytest.approx([last[0], *last[1:].reshape(4, 2).sum(axis=1)])
    turned = difference.cells(long, short, 80, 20)
    assert turned["difference"].to_numpy() == pytest.approx(-cells["difference"].to_numpy())
    assert difference.cells(short, long, 20, 80, "contribution_rms").empty


def test_full_is_compared_with_block_in_depth_blocks(folder):
    full, block = (open_run(folder / name) for name in ("full", "block"))
    cells = difference.cells(full, block, 200, 200)
    assert len(cells) == int(block.layout.triangle().sum())
    weight = full["depth_weight"][-1][-1]
    final = cells[cells["row"] == len(block.reads) - 1]["first"].to_numpy()
    spans = [slice(source.first, source.last + 1) for source in block.sources]
    assert final == pytest.approx([weight[span].sum() for span in spans])


def test_other_depths_are_aligned(tmp_path):
    made.run(tmp_path / "short", "full", blocks=2, steps=5, created=1)
    made.run(tmp_path / "long", "prenorm", blocks=4, steps=9, created=2)
    at = opened(tmp_path, "pages_/compare.py")
    assert not at.exception
    _, (frame,) = plotted(at)[0]
    assert frame["depth"].min() == 0 and frame["depth"].max() == 1


def test_the_table_of_one_run_names_its_two_steps(folder):
    run = open_run(folder / "full")
    table = difference.table(run, run, match.Pair(200, 0, ""), ("full", "full"))
    assert list(table) == ["Measure", "full, step 200", "full, step 0", "Difference", "Ratio"]
    assert table.iloc[0].tolist() == ["Step", "200", "0", "-200", "–"]
    same = difference.table(run, run, match.Pair(200, 200, ""), ("full", "full"))
    assert list(same)[1:3] == ["full, step 200", "full, step 200 (again)"]
