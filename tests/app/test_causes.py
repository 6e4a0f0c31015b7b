"""The page Attribution: on runs with, without and with broken attributions; what it says is in the numbers."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from app import causes, verdicts
from app.charts.causes import _apart
from probes import open_run
from probes.attributed import FOLDER, Curve
from probes.layout import Layout
from tests.app import made
from tests.app.test_pages import SAMPLE_RUNS, opened, plotted, said

PAGE = "pages_/attribution.py"


@pytest.fixture(scope="module")
def attributed(folder, tmp_path_factory):
    """Full with two steps, PreNorm with layers alone, Block with nothing."""
    root = tmp_path_factory.mktemp("causes") / "runs"
    shutil.copytree(folder, root)
    made.attribution(root / "full", step=100)
    made.attribution(root / "full")
    made.attribution(root / "prenorm", with_edges=False, notes=("Its edges cannot be gated.",))
    return root


def test_a_run_with_all_of_it(attributed):
    at = opened(attributed, PAGE, runs=["full", "block"], caused="full")
    assert not at.exception
    told = said(at)
    for wanted in (
        "Does the weight go to what matters?",
        "Which layers does the model need?",
        "What if the least important were removed?",
        "How did that change over training?",
        "High weight and no effect: the embedding in",
        "Ballast, which can go for less than 0.00300 nats per token: layer 3 (attention) (-0.001 ± 0.002).",
        "The better guide to layers is their attribution",
        "block has no attribution yet: depthscope attribute RUN --checkpoint FILE --data FILE",
    ):
        assert wanted in told.replace("`", "").replace("**", ""), wanted
    assert not any("and are no shares" in each.value for each in at.caption)  # by ablation
    charts = plotted(at)
    assert len(charts) == 10
    found = open_run(attributed / "full").attributions()[-1]
    (frame, *_) = charts[1][1]
    there = found.layout.triangle()
    assert frame["value"].to_numpy() == pytest.approx(found.edges["ablation"][there])
    ranked = charts[5][1][0]
    assert ranked.set_index("place")["value"]["layer 1 (attention)"] == pytest.approx(0.5)


def test_a_read_and_a_method_can_be_chosen(attributed):
    at = opened(attributed, PAGE, runs=["full"], cause_read="6", cause="gradient", cause_layers="gradient")
    assert not at.exception
    assert "Layer 6 (MLP) gives" in said(at)
    assert any("and are no shares" in each.value for each in at.caption)
    (bars, *_) = plotted(at)[2][1]
    assert bars["what"].tolist() == ["Weight"] * 6 + ["Attribution"] * 6
    assert bars["relative"].abs().groupby(bars["what"]).max().tolist() == pytest.approx([1, 1])
    assert not opened(
        attributed, PAGE, runs=["full"], cause_read="99", cause="lime", attribution="x"
    ).exception


def test_layers_alone(attributed):
    at = opened(attributed, PAGE, runs=["prenorm"])
    told = said(at)
    assert not at.exception and "Its edges cannot be gated." in told
    assert "Does the weight go to what matters?" not in told and "Which layers does the model need?" in told
    assert "shares of the final state are not known here" in told


def test_a_run_without_any(folder):
    at = opened(folder, PAGE, runs=["full"])
    assert not at.exception and not plotted(at)
    assert "full has no attribution yet" in said(at).replace("**", "")


def test_what_lacks_it_is_told_of_several_runs(folder):
    at = opened(folder, PAGE)
    assert "have no attribution yet" in said(at)


def test_a_broken_file_is_told_and_the_others_shown(attributed, tmp_path):
    shutil.copytree(attributed / "full", tmp_path / "full")
    first, second = sorted((tmp_path / "full" / FOLDER).iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    at = opened(tmp_path, PAGE)
    assert not at.exception and len(plotted(at)) == 8
    assert f"The attribution {first.name} is left out" in said(at)
    shutil.copytree(tmp_path / "full", tmp_path / "other" / "full")
    (tmp_path / "other" / "full" / FOLDER / second.name).write_bytes(b"")
    at = opened(tmp_path / "other", PAGE)
    assert not at.exception and not plotted(at) and "has no attribution yet" in said(at)


def test_what_was_recorded_while_training_is_shown(tmp_path, monkeypatch):
    before = made.rows

    def rows(variant, shape, step, without=(), matrices=True):
        yield from before(variant, shape, step, without, matrices)
        yield "depth_attribution", step, shape.pack(made.triangle(shape, 0.5)[0] * step)

    monkeypatch.setattr(made, "rows", rows)
    from probes import vocabulary

    if causes.LIVE not in vocabulary.METRICS:
        row = vocabulary.Metric(causes.LIVE, vocabulary.TRIANGLE, "Attribution", "nats per token", "x")
        monkeypatch.setitem(vocabulary.METRICS, causes.LIVE, row)
    made.run(tmp_path / "full", "full", steps=5)
    at = opened(tmp_path, PAGE, step="20")
    assert not at.exception and len(plotted(at)) == 5
    (frame, *_) = plotted(at)[1][1]
    run = open_run(tmp_path / "full")
    assert frame["value"].to_numpy() == pytest.approx(run[causes.LIVE][2][run.layout.triangle()])


# What is said is in the numbers


def edges(weight, value, error=0.0) -> pd.DataFrame:
    count = len(weight)
    return pd.DataFrame(
        {
            "number": 5, "read": "layer 5 (attention)", "kind": "attention", "source": range(count),
            "from": ["embedding", *(f"layer {i} (MLP)" for i in range(1, count))], "sources": count,
            "weight": weight, "even": np.array(weight) * count, "value": value, "needed": value, "error": error,
        }
    )  # fmt: skip


def test_rank_correlation_is_spearmans():
    frame = edges([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 9.0])
    assert causes.correlations(frame)["value"].tolist() == pytest.approx([1])
    assert causes.correlations(frame.assign(needed=-frame["value"]))["value"].tolist() == pytest.approx([-1])
    assert causes.correlations(frame.assign(weight=0.25))["value"].isna().all()
    assert "cannot be compared" in verdicts.agreement(frame.assign(weight=1.0))


def test_disagreements_are_the_heavy_without_effect_and_the_light_with_it():
    weight = [0.4, 0.2, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04]
    frame = edges(weight, [0.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05, -0.9])
    odd = causes.disagreements(frame)
    assert odd.loc[odd["odd"] == "weight", "label"].iloc[0] == "5 ← emb."
    assert odd.loc[odd["odd"] == "effect", "label"].iloc[0] == "5 ← 7"
    assert verdicts.scatter_sentence(frame).startswith(
        "More weight than effect: the embedding in layer 5 (attention)"
    )


def test_the_idle_link_is_there_or_said_to_be_missing(attributed):
    found = open_run(attributed / "full").attributions()[-1]
    links = verdicts.idle(found)
    assert len(links.links) and (links.links["value"].abs() + 2 * links.links["error"] <= 0.003).all()
    assert links.sentence().startswith("High weight and no effect: ")
    effects = np.where(found.layout.triangle(), 0.5, np.nan)
    none = verdicts.idle(replace(found, edges={"ablation": effects}))
    assert none.links.empty and "There is no link of high weight and no effect: of" in none.sentence()
    # An effect of zero that is not sure is none either.
    unsure = replace(
        found, edges={"ablation": 0 * effects}, edges_std={"ablation": np.full(effects.shape, 9.0)}
    )
    assert verdicts.idle(unsure).links.empty
    there = found.layout.triangle()
    even = replace(found, weight=np.where(there, 1 / there.sum(1, keepdims=True), np.nan))
    assert verdicts.idle(even).sentence().startswith("No link has a weight of")
    assert verdicts.idle(replace(found, weight=np.where(there, 1.0, np.nan))) is None  # a plain sum
    assert verdicts.idle(replace(found, edges={})) is None


def test_the_standard_error_is_that_of_the_mean(attributed):
    """Of what `n` sequences spread by; of one nobody knows it, and nothing is sure."""
    found = open_run(attributed / "full").attributions()[-1]
    drawn = np.random.default_rng(0).normal(size=(16, len(found.layout.layers)))
    found = replace(found, layers={"removal": drawn.mean(0)}, layers_std={"removal": drawn.std(0)})
    frame = causes.layers(found, "removal")
    assert frame["error"].to_numpy() == pytest.approx(pd.DataFrame(drawn).sem().to_numpy())
    one = replace(
        open_run(attributed / "full").attributions()[-1],
        about=replace(found.about, sequences=1),
        edges_std={"ablation": np.zeros(found.layout.triangle().shape)},
        layers_std={"removal": np.zeros(len(found.layout.layers))},
    )
    assert causes.edges(one, "ablation")["error"].isna().all()
    assert verdicts.idle(one).links.empty and "is not known: of one sequence" in verdicts.idle(one).sentence()
    assert verdicts.ballast(one).empty and "Ballast: not known" in verdicts.ballast_sentence(one)


def test_of_a_logit_neither_direction_is_worse(attributed):
    """What makes it fall is needed as much as what makes it rise."""
    found = open_run(attributed / "full").attributions()[-1]
    effects = np.linspace(-3, 0.2, len(found.layout.layers))
    effects[4] = 0.001
    found = replace(
        found,
        about=replace(found.about, target="logit of token 3 at position -1", unit="logits"),
        layers={"removal": effects},
        edges={"ablation": -found.edges["ablation"]},
    )
    assert verdicts.ballast(found)["layer"].tolist() == [5]
    assert verdicts.needed(causes.layers(found, "removal")).startswith(
        "Most needed is layer 1 (attention) (-3)"
    )
    assert causes.edges(found, "ablation")["needed"].min() == 0
    falls = Curve(np.arange(5), {"weight": -np.linspace(0, 1, 5), "attribution": -np.linspace(0, 0.5, 5)})
    told = verdicts.guide(falls, "layers", found.about)
    assert "is their attribution: while half" in told and "at position -1 changes by +0.125" in told


def test_over_training_the_same_question_is_compared(attributed):
    everything = open_run(attributed / "full").attributions()
    first, last = everything
    assert [each.step for each in causes.alike(last, everything)] == [100, 200]
    fewer = replace(first, layers={}, about=replace(first.about, created=9e9))
    others = replace(first, about=replace(first.about, data="other.txt", created=9e9))
    for odd in (fewer, others):
        assert causes.alike(last, [odd, *everything])[0].layers.keys() == first.layers.keys()
        assert causes.alike(last, [odd, last]) == [last]


def test_the_better_guide_is_the_curve_that_stays_low():
    counts, rise = np.arange(5), np.linspace(0, 1, 5)
    curve = Curve(
        counts, {"weight": 2 + rise, "attribution": 2 + rise**2, "random": np.stack([2 + 2 * rise] * 2)}
    )
    assert verdicts.area(curve, "weight") == pytest.approx(0.25)
    assert verdicts.area(curve, "random") == pytest.approx(0.5)
    told = verdicts.guide(curve, "layers")
    assert (
        told.startswith("The better guide to layers is their attribution: while half")
        and "chance" not in told
    )
    worse = Curve(counts, {"weight": 2 + 3 * rise, "random": np.stack([2 + rise])})
    assert "no better than chance" in verdicts.guide(worse, "layers")


def test_shares_are_those_that_were_recorded_where_none_were_measured(tmp_path):
    made.run(tmp_path / "run", "prenorm", steps=2)
    run = open_run(tmp_path / "run")
    assert np.isnan(causes.recorded_share(run, 10)).all()
    assert isinstance(run.layout, Layout)


def test_the_newest_is_shown_first(attributed, tmp_path):
    """Of the last step that was attributed, whatever its digest."""
    root = tmp_path / "runs"
    shutil.copytree(attributed, root)
    made.attribution(root / "full", digest="000000000000", created=2e9)
    made.attribution(root / "full", step=100, digest="ffffffffffff", created=3e9)
    at = opened(root, PAGE, runs=["full"])
    told = next(box for box in at.selectbox if box.label == "Attribution").options
    assert [each.split(":")[0] for each in told] == ["Step 200", "Step 200", "Step 100", "Step 100"]
    assert "(0000)" in told[0] and "(ffff)" in told[2]


def test_a_plain_sum_shows_no_weights():
    """They are all one: nothing is said of where they go."""
    at = opened(SAMPLE_RUNS, PAGE, runs=["prenorm"], cause_read="25")
    assert not at.exception
    told = said(at)
    assert "Which edges matter?" in told and "of the weight goes" not in told and "most weight" not in told
    assert "The final read: layer 2 (MLP) has the largest effect" in told
    assert "A plain residual gives every source weight one" in told and "High weight" not in told
    (found,) = open_run(SAMPLE_RUNS / "prenorm").attributions()
    assert "eight" not in " ".join(verdicts.sentences(found, "prenorm"))


@pytest.mark.parametrize("scale", [{}, {"type": "symlog", "constant": 0.01}])
def test_labels_of_neighbours_lie_apart(scale):
    frame = pd.DataFrame({"even": [0.0, 2.0, 2.01, 2.02, 1.98], "value": [-1.0, 1.0, 1.01, 1.0, 1.02]})
    odd = frame.iloc[1:]
    placed = _apart(odd, frame, scale, 340)
    assert {side for side, _ in placed} == {"right"}  # at the edge of the chart they hang to the left
    at = (lambda x: np.sign(x) * np.log1p(np.abs(x) / 0.01)) if scale else np.asarray
    points = 340 * (at(1.02) - at(odd["value"].to_numpy())) / (at(1.02) - at(-1.0))
    heights = np.sort(points + [dy for _, dy in placed])
    assert np.diff(heights).min() > 11
