"""Cells: the read × source pictures, chosen by AttnRes or recovered from any model's states."""

import numpy as np
import pytest

from app import cells, explained, links, reads
from app.frames import profile, series
from probes import open_run
from probes.vocabulary import SCALAR, metric
from tests.app.test_pages import SAMPLE_RUNS, mounted, opened, plotted, said


def test_cells_are_exactly_those_that_exist(tiny):
    found = cells.cells(tiny, 25)
    assert len(found) == 15
    assert found["step"].unique().tolist() == [20]
    row = found[(found["read"] == "layer 4 (MLP)") & (found["from"] == "layer 1 (attention)")].iloc[0]
    assert row["depth_weight"] == pytest.approx(0.6)
    assert row["contribution_rms"] == pytest.approx(1.2)
    assert found.groupby("row", observed=True)["depth_weight"].sum().tolist() == pytest.approx([1] * 5)
    assert found.loc[found["newest"], "source"].tolist() == [0, 1, 2, 3, 4]


def test_attention_and_mlp_reads_are_separable(tiny):
    found = cells.cells(tiny, 20, kind="mlp")
    assert list(dict.fromkeys(found["read"])) == ["layer 2 (MLP)", "layer 4 (MLP)", "final read"]
    assert found["row"].max() == 2


def test_a_metric_of_another_step_is_blank(tiny):
    assert cells.cells(tiny, 0)["contribution_rms"].isna().all()


def test_colours_are_centred_only_where_values_are_negative():
    weights = np.full(1000, 0.4)
    assert cells.span(np.append(weights, [0.0, np.nan, 1.0])) == pytest.approx((0, 0.4))
    strays = np.full(50, -0.01)  # as recovered weights do
    assert cells.span(np.append(weights, strays)) == pytest.approx((0, 0.4))
    assert cells.span(np.append(weights, 50 * strays)) == pytest.approx((-0.5, 0.5))
    assert cells.span(np.array([np.nan])) == (0, 1)


@pytest.mark.parametrize("name", ["prenorm", "full", "block"])
def test_recovered_cells_have_a_column_for_every_layer(recovered, name):
    run = open_run(recovered / name)
    found = cells.cells(run, run.last_step, "mixing_share")
    assert list(found["from"].cat.categories) == run.layout.outputs and len(found) == 15
    last = run["mixing_share"][-1]
    assert found["mixing_share"].to_numpy() == pytest.approx(last[np.tri(5, dtype=bool)], nan_ok=True)
    sums = found.groupby("row")["mixing_share"].sum().to_numpy()
    assert sums == pytest.approx(np.ones(5), abs=1e-3)
    frames = cells.played(run, "mixing_share", run.steps("mixing_share").tolist(), "mlp")
    only = cells.cells(run, run.last_step, "mixing_share", "mlp")
    assert frames[:, -1] == pytest.approx(only["mixing_share"].to_numpy(), nan_ok=True)


def test_the_final_share_is_the_last_row_of_the_mixing_share(recovered):
    run = open_run(recovered / "full")
    frame = profile(run, "full", "final_share", run.last_step)
    assert frame["place"].tolist() == run.layout.outputs
    assert frame["value"].to_numpy() == pytest.approx(run["mixing_share"][-1, -1])
    assert series(run, "final_share")[0].tolist() == run.steps("mixing_share").tolist()


def test_a_plain_residual_shows_its_recovered_mixing_in_the_same_picture(recovered):
    at = opened(recovered, "pages_/depth_attention.py", runs=["prenorm", "full"])
    assert not at.exception
    told = said(at)
    assert "prenorm at step 12: every source has weight 1.00 in every state, as in a plain sum" in told
    assert "prenorm chooses no weights: its recovered mixing weight is shown instead." in told
    assert "In prenorm the sources explain all of every state." in told
    (_, (weights, _)), (_, (mixing, _)) = plotted(at)[:2]
    assert "depth_weight" in weights and len(mixing) == 15
    assert mixing["mixing_weight"].to_numpy() == pytest.approx(np.ones(15), abs=1e-3)


def test_the_share_compares_a_plain_residual_with_attnres(recovered):
    at = opened(recovered, "pages_/depth_attention.py", runs=["prenorm", "block"], show="mixing_share")
    assert not at.exception
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
    assert any(title.startswith("prenorm at step 12: the newest source makes up") for title in titles)
    assert any(title.startswith("Share of the embedding:") for title in titles)
    run = open_run(recovered / "prenorm")
    share = run["mixing_share"][-1]
    told = reads.over_training(run, "prenorm", name="mixing_share").iloc[-1]
    assert told["embedding"] == pytest.approx(share[2:, 0].mean())
    assert told["newest"] == pytest.approx(np.diag(share)[2:].mean())
    strongest = links.strongest(run, 12, "mixing_share")[0]
    assert strongest.sentence("mixing_share").startswith(("The state into layer", "The final state is"))
    assert strongest.value == pytest.approx(share[strongest.row - 1, strongest.column])


def test_dilution_shows_what_the_final_state_is_made_of(recovered):
    at = opened(recovered, "pages_/dilution.py", runs=["prenorm", "full"])
    assert not at.exception and "The largest part of the final state at step 12 is" in said(at)
    frame = next(rows[0] for spec, rows in plotted(at) if "Share of the final state" in str(spec))
    for name in ("prenorm", "full"):
        shown = frame.loc[frame["run"] == name, "value"].to_numpy()
        assert shown == pytest.approx(open_run(recovered / name)["mixing_share"][-1, -1])


def test_a_source_in_focus_is_not_taken_for_another_one(recovered):
    """Recovered mixing of a Block run has a column for each layer, its reads one for each depth block."""
    at = opened(recovered, "pages_/depth_attention.py", runs=["block"], focus="block", read="5", source="2")
    assert at.session_state["view"].source == 2
    at.selectbox(key="pick show").set_value("mixing_share").run()
    assert not at.exception
    assert (at.session_state["view"].read, at.session_state["view"].source) == (5, None)


def test_every_recorded_metric_over_depth_is_explained(recovered):
    recorded = [name for name in open_run(recovered / "full").metrics if metric(name).axes != SCALAR]
    for name in [*recorded, "final_share"]:
        equation, reading = explained.TOLD[name]
        assert reading and explained.told(name).count("$") == (2 if equation else 0)
    at = opened(recovered, "pages_/dilution.py")
    assert "PreNorm dilution" in said(at) and "displaystyle" in said(at)


def test_states_of_more_sources_than_can_be_told_apart_are_not_claimed():
    """24 transformer blocks of width 128: states of up to 32 sources are solved, and the final one has 49."""
    at = opened(SAMPLE_RUNS / "prenorm-24", "pages_/depth_attention.py")
    told = said(at)
    assert (
        "every source has weight 1.00 in the 32 of 49 states that could be solved, as in a plain sum" in told
    )
    assert (
        "the sources explain all of every state that could be solved. 715 of 1225 cells are striped" in told
    )
    at = opened(SAMPLE_RUNS / "prenorm-24", "pages_/dilution.py")
    assert "It cannot be told of the 49 sources of prenorm-24" in said(at) and "nan" not in said(at)
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
    assert titles and not any("share of the final state" in title.lower() for title in titles)


def test_a_baseline_too_deep_to_be_solved_is_no_less_a_plain_sum():
    told = said(opened(SAMPLE_RUNS / "deep-prenorm", "pages_/attribution.py"))
    assert "**The final read: layer 4 (MLP) has the largest effect**" in told
    assert "A plain residual gives every source weight one" in told


def test_rounding_is_no_difference():
    told = said(opened(SAMPLE_RUNS / "prenorm-24", "pages_/compare.py"))
    assert (
        "Recovered mixing weight is the same at step 0 and at step 399, to a thousandth of the largest."
        in told
    )
    assert "Further differences" not in told
    assert "Further differences" in said(opened(SAMPLE_RUNS / "block-24", "pages_/compare.py"))


def test_of_a_run_that_broke_the_last_finite_step_is_told():
    told = said(opened(SAMPLE_RUNS / "unhealthy", "pages_/dilution.py"))
    assert "Growth exponent at the last step that is finite: 2.35" in told
    assert "At step 99 fewer than three states are finite: there is nothing to fit." in told
    told = said(opened(SAMPLE_RUNS / "unhealthy", "pages_/gradients.py"))
    assert "**unhealthy** has no finite update ratio (estimate) at step 99." in told
