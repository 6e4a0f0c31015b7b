"""Token reads: the numbers of a snapshot reach the page of tokens, as text, as tokens × sources and as a triangle."""

import numpy as np
import pytest

from app import token_reads
from probes import open_run
from probes.manifest import RANK_FOLDER
from probes.tokens import token_path, write_tokens
from tests.app import made
from tests.app.test_pages import mounted, opened, plotted, said, shown_step

TEXTS = [["def", " f", "(", "\n", "<b>", "pad"], ["a", " ", "\t", "\\", "b", "c"]]
STEPS = (0, 100, 200)


@pytest.fixture
def followed(tmp_path):
    """A run of 4 layers that follows 2 sequences of 6 tokens; the last token of the first one is padding."""
    path = made.run(tmp_path / "full", "full", blocks=2)
    layout = open_run(path).layout
    for step in STEPS:
        weight = np.broadcast_to(made.triangle(layout, step / 200)[0], (2, 6, 5, 5)).copy()
        # The read of layer 4 (number 4) turns to layer 2, token by token, while it learns.
        for token in range(6):
            turned = 0.9 * token / 6 * step / 200
            weight[:, token, 3, :4] *= 1 - turned
            weight[:, token, 3, 2] += turned
        weight[0, 5] = np.nan
        write_tokens(path / RANK_FOLDER, step, layout.pack(weight), np.arange(12).reshape(2, 6), TEXTS)
    return path


def test_a_line_has_the_weights_of_every_token_that_is_no_padding(followed):
    run = open_run(followed)
    told = run.tokens()
    frame = token_reads.line(told, 0, 4, 2)
    assert frame["weight"].to_numpy() == pytest.approx(told.weight[0, :5, 3, 2])
    assert frame["token"].tolist() == [1, 2, 3, 4, 5]
    assert frame["shown"].tolist() == ["def", " f", "(", "↵", "<b>"]
    assert frame["line"].tolist() == [0, 0, 0, 0, 1] and frame["start"].tolist() == [0, 3, 5, 6, 0]
    assert token_reads.line(told, 1, 4, 2)["told"].tolist() == ["“a”", "“␣”", "“→”", "“\\”", "“b”", "“c”"]


def test_what_differs_most_between_tokens_is_found(followed):
    run = open_run(followed)
    first = token_reads.contrasts(run, run.tokens(), 0)[0]
    course = run.tokens().weight[0, :5, 3, 2]
    assert (first.read, first.source) == (4, 2)
    assert (first.low, first.high) == pytest.approx((course.min(), course.max()))
    assert first.sentence(run) == (
        f"Layer 4 (MLP) reads layer 2 (MLP) with {course[0]:.2f} at “def” and {course[4]:.2f} at “<b>”"
    )
    assert token_reads.contrasts(run, run.tokens(0), 0) == []  # every token reads the same at first


def test_a_long_token_and_long_lines_are_wrapped(followed):
    told = open_run(followed).tokens()
    told.texts[1][:] = ["x" * 200, "y" * 50, "z" * 50, "", "\u200b", "語" * 60]
    frame = token_reads.line(told, 1, 4, 2)
    assert frame["end"].max() <= token_reads.LONG
    assert frame["line"].tolist() == [0, 1, 2, 2, 2, 3]
    assert frame["shown"].tolist()[3:5] == ["∅", "·"]


def test_the_page_shows_what_was_recorded_and_plays_it(followed):
    at = opened(followed, "pages_/tokens.py", focus="full", read="4", source="2")
    assert not at.exception
    run = open_run(followed)
    text, grid, triangle = mounted(at, "depthscope_chart")
    assert shown_step(at) == 200
    assert text["rows0"]["weight"].to_numpy() == pytest.approx(run.tokens().weight[0, :5, 3, 2])
    assert grid["rows0"]["weight"].to_numpy() == pytest.approx(run.tokens().weight[0, :5, 3, :4].ravel())
    token = int(np.argmax(run.tokens().weight[0, :5, 3, 2]))
    there = run.layout.triangle()
    assert triangle["rows0"]["depth_weight"].to_numpy() == pytest.approx(run.tokens().weight[0, token][there])
    for chart, value in ((text, lambda told: told[0, :5, 3, 2]), (grid, lambda told: told[0, :5, 3, :4])):
        assert chart["frames"]["steps"] == list(STEPS)
        for at_step, step in enumerate(STEPS):
            shown = chart[chart["frames"]["fields"]["weight"]][f"s{at_step}"]
            assert shown.to_numpy() == pytest.approx(value(run.tokens(step).weight).ravel())
    assert "What layer 4 (MLP) of full reads from layer 2 (MLP) at step 200" in text["alt"]
    assert "“<b>” (token 5)" in text["alt"] and "Layer 4 (MLP) reads layer 2 (MLP)" in str(
        [button.label for button in at.button]
    ).replace("\\", "")


def test_other_reads_and_the_second_sequence_are_a_choice_away(followed):
    at = opened(followed, "pages_/tokens.py", step="110")
    assert shown_step(at) == 100
    at.selectbox(key="pick token read").set_value(5).run()
    at.selectbox(key="pick token source").set_value(1).run()
    at.selectbox(key="pick sequence").set_value(2).run()
    (_, (frame, _)), *_ = plotted(at)
    assert frame["weight"].to_numpy() == pytest.approx(open_run(followed).tokens(100).weight[1, :, 4, 1])
    assert "Tokens are shown as" not in said(at)
    assert "What the final read of full reads from layer 1 (attention) at step 100" in str(
        [data["alt"] for data in mounted(at, "depthscope_chart")]
    )
    # The page of depth attention looks at the same read, and a link brings all of it back.
    now = at.session_state["view"]
    assert (now.focus, now.read, now.source, now.sequence) == ("full", 5, 1, 2)


def test_tokens_without_texts_are_their_ids(followed):
    for step in STEPS:
        token_path(followed / RANK_FOLDER, step).unlink()
    layout = open_run(followed).layout
    weight = np.broadcast_to(made.triangle(layout, 1.0)[0], (1, 3, 5, 5))
    write_tokens(followed / RANK_FOLDER, 50, layout.pack(weight), np.array([[7, 70, 700]]), None)
    at = opened(followed, "pages_/tokens.py")
    assert not at.exception and "Only step 50 is recorded so far" in said(at)
    assert "Tokens are shown as ids" in said(at) and "decode=…" in said(at)
    (_, (frame, _)), *_ = plotted(at)
    assert frame["shown"].tolist() == ["7", "70", "700"] and frame["start"].tolist() == [0, 2, 5]


def test_a_broken_snapshot_is_told_and_the_others_play(followed):
    broken = token_path(followed / RANK_FOLDER, 100)
    broken.write_bytes(broken.read_bytes()[:-20])
    at = opened(followed, "pages_/tokens.py", step="100")
    assert not at.exception and "The token snapshot of full at step 100" in said(at)
    at = opened(followed, "pages_/tokens.py")
    assert mounted(at, "depthscope_chart")[0]["frames"]["steps"] == [0, 200]


def test_a_run_that_follows_no_tokens_says_how(folder):
    at = opened(folder, "pages_/tokens.py", runs=["full"])
    assert (
        "full recorded no single tokens" in said(at).replace("*", "") and "tokens_every=" in at.code[0].value
    )


@pytest.mark.browser
def test_a_click_on_a_token_shows_what_every_layer_reads_for_it(followed, serve, watched):
    watched.goto(f"{serve(followed)}/tokens?focus=full&read=4&source=2")
    watched.wait_for_selector(".depthscope-chart >> nth=2 >> canvas", timeout=30_000)
    watched.wait_for_timeout(1_000)
    box = watched.locator(".depthscope-chart").first.bounding_box()
    watched.mouse.click(box["x"] + 15, box["y"] + 20)  # the first token
    watched.wait_for_selector("text=/“def”, token 1, at step 200/")
    watched.wait_for_url("**token=1*")
    watched.locator(".depthscope-player input").press("Home")
    watched.wait_for_selector("text=/layer 2 .MLP. at step 0: 0.25 for every token/")
