"""The view survives its URL, and a link written by somebody else never breaks a page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.view import View
from tests.app.test_pages import opened, picked_step, said, shown_step


@given(
    st.builds(
        View,
        runs=st.lists(st.text(min_size=1), unique=True).map(tuple),
        step=st.none() | st.integers(0, 10**9),
        reads=st.sampled_from(["all", "attention", "mlp"]),
        show=st.sampled_from(["depth_weight", "contribution_rms"]),
    )
)
def test_a_view_comes_back_from_its_parameters(view):
    assert View.parse(view.params()) == view


def test_defaults_stay_out_of_the_url():
    assert View().params() == {}


@pytest.mark.parametrize("step", ["", "latest", "-3", "1e3", "²"])
def test_a_bad_step_is_the_latest(step):
    assert View.parse({"step": [step]}).step is None


def test_a_link_restores_runs_step_and_measure(folder):
    at = opened(
        folder,
        "pages_/depth_attention.py",
        runs=["block", "full"],
        step="100",
        reads="mlp",
        show="contribution_rms",
    )
    assert not at.exception
    assert at.multiselect(key="pick runs").value == ["block", "full"]
    assert shown_step(at) == 100
    assert at.selectbox(key="pick reads").value == "mlp"
    assert "block, MLP reads at step 100" in said(at)


def test_a_link_to_a_lost_run_says_so(folder):
    at = opened(folder, runs=["full", "gone"])
    assert [w.value for w in at.warning] == ["The link names gone: no such run is here."]


def test_nonsense_in_a_link_opens_the_default(folder):
    for page in ("runs", "dilution", "gradients", "depth_attention", "compare"):
        at = opened(
            folder,
            f"pages_/{page}.py",
            runs=["full"],
            step="99999",
            scalar="x",
            depth="y",
            gradient="z",
            show="w",
            reads="v",
        )
        assert not at.exception


def test_a_pick_is_kept_across_pages(folder):
    at = opened(folder, "pages_/dilution.py")
    picked_step(at, 50)
    at.multiselect(key="pick runs").set_value(["full"]).run()
    at.switch_page("pages_/gradients.py").run()
    assert shown_step(at) == 50
    assert at.multiselect(key="pick runs").value == ["full"]


def test_the_player_follows_until_it_is_moved(folder):
    at = opened(folder, "pages_/dilution.py")
    assert shown_step(at) == 200 and at.session_state["view"].step is None
    picked_step(at, 30)
    assert shown_step(at) == 30
    assert "at step 30" in said(at)
