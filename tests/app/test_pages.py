"""Every page opens on every kind of folder: no exception, and a sentence where something is missing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from streamlit.testing.v1 import AppTest

import app
from probes import open_run
from probes.writer import RunWriter
from tests.app import made

MAIN = Path(app.__file__).with_name("main.py")
PAGES = ["runs", "dilution", "gradients", "depth_attention", "tokens", "attribution", "compare"]
SAMPLE_RUNS = Path(__file__).resolve().parents[2] / "sample_runs"
SAMPLES = sorted(path.parent.name for path in SAMPLE_RUNS.glob("*/run.json"))
FOLDERS = [
    "prenorm", "full", "block", "empty", "missing metrics", "broken shard", "single step", "few steps",
    "nothing yet", "unreadable manifest",
]  # fmt: skip


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])


def opened(folder: Path, page: str = "", **params) -> AppTest:
    """The page of a folder, run once."""
    sys.argv = ["main.py", str(folder)]
    at = AppTest.from_file(str(MAIN), default_timeout=60)
    at.query_params.from_dict(params) if hasattr(at.query_params, "from_dict") else at.query_params.update(
        params
    )
    if page:
        at.switch_page(page)
    return at.run()


def said(at: AppTest) -> str:
    kinds = (at.title, at.subheader, at.markdown, at.caption, at.info, at.warning)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


def mounted(at: AppTest, name: str) -> list[dict]:
    """What every browser component of a name was given, its tables as frames."""
    found = []
    for element in at.get("bidi_component"):
        if element.proto.component_name != name:
            continue
        mixed = element.proto.mixed
        data = json.loads(mixed.json or element.proto.json)
        for key, value in data.items():
            if isinstance(value, dict) and "__streamlit_arrow_ref__" in value:
                blob = mixed.arrow_blobs[value["__streamlit_arrow_ref__"]].data
                data[key] = pa.ipc.open_stream(blob).read_pandas()
        found.append(data)
    return found


def plotted(at: AppTest) -> list[tuple[dict, list]]:
    """Specification and rows of every chart on the page."""
    charts = mounted(at, "depthscope_chart")
    return [(json.loads(data["spec"]), [data[name] for name in data["tables"]]) for data in charts]


def shown_step(at: AppTest) -> int:
    """The step at which the page's player stands."""
    (player,) = mounted(at, "depthscope_player")
    return player["steps"][player["at"]]


def picked_step(at: AppTest, step: int | None) -> AppTest:
    """The page after somebody moved the player: a test cannot press it, so its answer is given."""
    at.session_state["view"] = replace(at.session_state["view"], step=step)
    return at.run()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_page_opens_every_folder(folders, name, page):
    at = opened(folders[name], f"pages_/{page}.py")
    assert not at.exception
    assert at.title[0].value.endswith("?")


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_folder_says_how_to_record(folders, page):
    at = opened(folders["empty"], f"pages_/{page}.py")
    assert "No run is here yet" in said(at)
    assert "probes.record(model" in at.code[0].value


@pytest.mark.parametrize("run", SAMPLES)
def test_every_page_opens_every_sample_run(run):
    for page in PAGES:
        at = opened(SAMPLE_RUNS / run, f"pages_/{page}.py")
        assert not at.exception, page
        assert mounted(at, "depthscope_chart") or at.info, page  # a picture, or why there is none


def test_a_folder_that_is_missing_is_named(tmp_path):
    assert "no folder" in said(opened(tmp_path / "nowhere"))


def test_a_broken_shard_is_told_in_one_sentence(folders):
    assert "Steps 300 to 310 are missing" in said(opened(folders["broken shard"]))


def test_an_unreadable_run_is_told_and_the_others_open(folders):
    at = opened(folders["unreadable manifest"])
    assert "cannot be opened" in said(at) and len(plotted(at)) == 1


def test_missing_metrics_are_named(folders):
    assert (
        "did not record hidden-state rms"
        in said(opened(folders["missing metrics"], "pages_/dilution.py")).lower()
    )
    told = said(opened(folders["missing metrics"], "pages_/depth_attention.py"))
    assert "has recorded no depth weights" in told


def test_a_stopped_run_says_why(folders):
    assert "Stopped: KeyboardInterrupt" in said(opened(folders["few steps"]))


def test_a_plain_residual_has_nothing_to_read(folders):
    told = said(opened(folders["prenorm"], "pages_/depth_attention.py"))
    assert "adds every earlier output with weight one" in told


def test_the_compute_advantage_is_not_an_early_gap(folder, folders):
    assert "1.25×" in said(opened(folder))
    assert "1.25×" not in said(opened(folders["full"]))
    assert "1.25×" not in said(opened(folder, runs=["full", "block"]))


def test_dilution_shows_the_recorded_numbers(folder):
    at = opened(folder, "pages_/dilution.py", step="105")
    _, (frame,) = plotted(at)[0]
    for name in ("prenorm", "full", "block"):
        run = open_run(folder / name)
        shown = frame[frame["run"] == name]
        assert shown["step"].unique().tolist() == [100]
        row = run.steps("hidden_rms").tolist().index(100)
        assert shown["value"].to_numpy() == pytest.approx(run["hidden_rms"][row])


def test_depth_attention_shows_the_recorded_weights_of_two_runs(folder):
    at = opened(folder, "pages_/depth_attention.py", step="50")
    charts = plotted(at)
    assert len(charts) == 9  # two triangles, their readers, four measures over training, the entropy
    for (spec, (frame, _)), name in zip(charts[:2], ("full", "block"), strict=True):
        run = open_run(folder / name)
        row = run.steps("depth_weight").tolist().index(40)
        assert spec["layer"][0]["encoding"]["color"]["field"] == "depth_weight"
        assert frame["depth_weight"].to_numpy() == pytest.approx(run.layout.pack(run["depth_weight"][row]))
    assert "Last recorded up to step 50: 40 in full and 40 in block" in said(at)


def test_gradients_of_states_are_labelled(folder):
    at = opened(folder, "pages_/gradients.py", gradient="hidden_grad_rms")
    assert "not comparable between residual types" in said(at)
    at = opened(folder, "pages_/gradients.py", gradient="output_grad_rms")
    assert "Not comparable" not in "".join(warning.value for warning in at.warning)


def test_runs_of_other_lengths_share_a_page(tmp_path):
    made.run(tmp_path / "short", "full", blocks=2, steps=3, created=1)
    made.run(tmp_path / "long", "prenorm", blocks=4, steps=9, created=2)
    made.run(tmp_path / "later" / "long", "block", blocks=4, steps=9, created=3)
    for page in PAGES:
        assert not opened(tmp_path, f"pages_/{page}.py").exception
    at = opened(tmp_path, "pages_/dilution.py")
    assert "20 in short" in said(at)
    assert at.multiselect(key="pick runs").options == ["short", f"{tmp_path.name}/long", "later/long"]


def test_every_chart_has_a_title_and_labelled_axes(folder):
    for page in set(PAGES) - {"tokens", "attribution"}:  # these runs have neither
        at = opened(folder, f"pages_/{page}.py")
        titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
        assert titles and all(titles), page
        for spec, _ in plotted(at):
            layer = spec.get("layer", [spec])[0]["encoding"]
            assert all(layer[axis]["axis"]["title"] for axis in ("x", "y")), page


def test_a_run_without_finite_states_leads_to_the_last_that_were(tiny):
    at = opened(tiny.path, "pages_/dilution.py", step="10")
    assert not at.exception and len(plotted(at)) > 0  # one state of five is not finite: the others are drawn


def test_a_run_with_nothing_finite_left_leads_back(tmp_path):
    told = made.manifest("full", blocks=2)
    writer = RunWriter(tmp_path / "sick", told)
    rows = [("hidden_rms", 0, np.ones(5)), ("hidden_rms", 10, np.full(5, np.nan))]
    writer.put(lambda: rows, 10)
    writer.close("finished")
    at = opened(tmp_path, "pages_/dilution.py")
    assert "sick has no finite hidden-state RMS at step 10" in said(at).replace("*", "")
    at.button(key="alive hidden_rms sick").click().run()
    assert at.session_state["view"].step == 0 and not at.exception
    assert plotted(at)[0][1][0]["value"].tolist() == [1] * 5
