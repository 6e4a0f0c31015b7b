"""The pages in a real browser: no error, quick, nothing fetched from elsewhere, and a run that grows."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from probes.writer import RunWriter
from tests.app import made

PAGES = ["", "dilution", "gradients", "depth_attention", "tokens", "attribution", "compare"]
WITHOUT = ("tokens", "attribution")  # pages that have nothing of these runs to show, and say so
CHART = ".depthscope-chart :is(canvas, svg)"
SAID = "[data-testid=stAlert]"
PLAYER = ".depthscope-player input"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def static(serve, folder) -> str:
    return serve(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_draws(static, watched, name, scheme):
    watched.emulate_media(color_scheme=scheme)
    watched.goto(f"{static}/{name}")
    watched.wait_for_selector(SAID if name in WITHOUT else CHART, timeout=30_000)
    watched.wait_for_timeout(500)


def test_a_link_and_the_slider_meet_in_the_url(static, watched):
    watched.goto(f"{static}/dilution?runs=full&step=100")
    watched.wait_for_selector("text=/at step 100/")
    watched.locator(PLAYER).press("ArrowLeft")
    watched.wait_for_selector("text=/at step 90/")
    watched.wait_for_url("**/dilution?*step=90*")
    link = watched.get_by_role("link", name="Gradients")
    watched.wait_for_function("a => a.href.includes('step=90')", arg=link.element_handle())
    link.click()
    # At once, and not only when the page has been made.
    assert "step=90" in watched.url and "runs=full" in watched.url
    watched.wait_for_selector("text=/at step 90/")
    watched.wait_for_url("**/gradients?*step=90*")


@pytest.mark.parametrize("name", ["", "compare", "dilution"])
def test_a_narrow_window_cuts_nothing_off(static, watched, name):
    watched.set_viewport_size({"width": 900, "height": 900})
    watched.goto(f"{static}/{name}")
    watched.wait_for_selector("[data-testid=stExpander]", timeout=30_000)
    watched.wait_for_selector(CHART)
    groups = watched.locator(".stMainBlockContainer [role=radiogroup]")
    groups.first.wait_for()
    for at in range(groups.count()):
        assert groups.nth(at).evaluate("group => group.scrollWidth <= group.clientWidth + 1")
    # Side by side each would have half of the room.
    room = watched.locator(".stMainBlockContainer").evaluate("e => e.clientWidth")
    for width in watched.locator(".depthscope-chart").evaluate_all("all => all.map(e => e.clientWidth)"):
        assert width > 0.6 * room


def test_a_chart_is_saved(static, watched):
    watched.goto(f"{static}/dilution?runs=full")
    watched.wait_for_selector(CHART)
    watched.get_by_text("Save").first.click()
    with watched.expect_download() as download:
        watched.get_by_role("button", name="Numbers (CSV)").first.click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "run,step,depth,place,value" and len(lines) == 14


def test_a_growing_run_grows_on_screen(serve, watched, tmp_path):
    told = made.manifest("full", blocks=2)
    writer = RunWriter(tmp_path / "growing", told)
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.wait(0.1):
            rows = list(made.rows("full", told.layout, step))
            writer.put(lambda rows=rows: rows, step)
            step += 10

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        address = serve(tmp_path)
        watched.goto(address)
        watched.wait_for_selector(CHART, timeout=30_000)
        watched.evaluate(f"window.kept = document.querySelector('{CHART}')")
        line = watched.locator(".mark-line path").first
        before, early = line.get_attribute("d"), _live_step(watched)
        watched.wait_for_function(
            "before => document.querySelector('.mark-line path')?.getAttribute('d') !== before",
            arg=before,
            timeout=15_000,
        )
        watched.wait_for_timeout(4_000)
        assert _live_step(watched) > early
        box = watched.locator(".depthscope-chart").bounding_box()
        watched.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
        watched.keyboard.down("Control")
        for _ in range(6):
            watched.mouse.wheel(0, -300)
            watched.wait_for_timeout(50)
        watched.keyboard.up("Control")
        watched.wait_for_timeout(200)
        zoomed, early = watched.evaluate(TICKS), _live_step(watched)
        watched.wait_for_function(f"() => {LIVE} > {early} + 30", timeout=15_000)
        watched.wait_for_timeout(300)
        assert watched.evaluate(TICKS) == zoomed and zoomed[0] != "0"
        assert watched.evaluate(f"window.kept === document.querySelector('{CHART}')")

        watched.get_by_role("link", name="Dilution").click()
        watched.wait_for_selector("text=/hidden-state RMS (grows|falls|stays)/")
        watched.locator(PLAYER).press("Home")
        watched.wait_for_selector("text=/at step 0/")
        held = _live_step(watched)
        watched.wait_for_function(f"() => {LIVE} > {held}", timeout=15_000)
        assert watched.get_by_text("from layer 3 to the final state at step 0").count() == 1
    finally:
        stop.set()
        thread.join()
        writer.close("finished")
    watched.wait_for_selector("text=/finished, step/", timeout=15_000)


PICTURE = "document.querySelector('.depthscope-chart canvas').toDataURL()"
TICKS = "[...document.querySelectorAll('.role-axis-label text')].map(t => t.textContent).slice(0, 4)"
LIVE = "Number(document.body.innerText.match(/running, step ([\\d,]+)/)?.[1].replace(/,/g, ''))"


def test_zooming_into_a_long_run_shows_more_of_its_steps(serve, watched, tmp_path):
    writer = RunWriter(tmp_path / "runs" / "long", made.manifest("full", blocks=1))
    losses = np.sin(np.arange(20_000) / 900).astype(np.float32)
    losses[12_345] = 50
    writer.put(lambda: [("loss", step, value) for step, value in enumerate(losses)], 20_000)
    writer.close("finished")
    watched.goto(serve(tmp_path / "runs"))
    watched.wait_for_selector(".mark-symbol path")
    drawn = "document.querySelectorAll('.depthscope-chart .mark-symbol path').length"
    before = watched.evaluate(drawn)
    assert before <= 2000
    box = watched.locator(".depthscope-chart").bounding_box()
    watched.mouse.move(box["x"] + box["width"] * 0.62, box["y"] + box["height"] / 2)
    watched.keyboard.down("Control")
    for _ in range(6):
        watched.mouse.wheel(0, -300)
        watched.wait_for_timeout(50)
    watched.keyboard.up("Control")
    watched.wait_for_function(f"{drawn} > {before} + 500", timeout=15_000)
    watched.locator(".depthscope-chart").dblclick()
    watched.wait_for_function(f"{drawn} === {before}", timeout=15_000)


def _live_step(page) -> int:
    return page.evaluate(f"() => {LIVE}")


def test_the_triangle_plays_without_the_server(static, watched):
    watched.goto(f"{static}/depth_attention?runs=full")
    watched.wait_for_selector(CHART, timeout=30_000)
    watched.wait_for_timeout(1_000)
    watched.wait_for_function(
        "() => [...document.querySelectorAll('.depthscope-chart')].every(c => c.querySelector('canvas, svg'))"
    )
    watched.wait_for_timeout(1_000)
    watched.evaluate("window.kept = document.querySelector('.depthscope-chart canvas')")
    watched.locator(PLAYER).scroll_into_view_if_needed()
    box = watched.locator(PLAYER).bounding_box()
    middle = box["y"] + box["height"] / 2
    watched.mouse.move(box["x"] + box["width"] - 8, middle)
    watched.mouse.down()
    for share in (0.9, 0.7, 0.5, 0.3, 0.1):
        before = watched.locator(".depthscope-chart").first.get_attribute("data-step")
        painted = watched.evaluate(PICTURE)
        watched.mouse.move(box["x"] + share * box["width"], middle)
        watched.wait_for_function(
            "before => document.querySelector('.depthscope-chart').dataset.step !== before", arg=before
        )
        assert watched.evaluate(PICTURE) != painted
    assert watched.get_by_text("full at step 200:").count() == 1  # Python has heard of nothing yet
    watched.mouse.up()
    watched.wait_for_selector("text=/full at step 20:/")
    watched.wait_for_url("**step=20*")
    assert watched.evaluate("window.kept === document.querySelector('.depthscope-chart canvas')")


def test_play_runs_to_the_end_and_follows_again(static, watched):
    watched.goto(f"{static}/depth_attention?runs=full&step=100")
    watched.wait_for_selector("text=/full at step 100/")
    watched.wait_for_timeout(1_000)
    watched.get_by_role("button", name="Play the training").click()
    watched.wait_for_selector("text=/full at step 200:/", timeout=20_000)
    assert "step=" not in watched.url


def test_a_read_of_the_attribution_is_chosen(serve, watched, folder, tmp_path):
    shutil.copytree(folder / "full", tmp_path / "runs" / "full")
    made.attribution(tmp_path / "runs" / "full")
    watched.goto(f"{serve(tmp_path / 'runs')}/attribution?cause_read=6")
    watched.wait_for_selector("text=/Layer 6 .MLP. gives/")
    watched.wait_for_selector("text=/High weight and no effect/")
    watched.wait_for_timeout(1_000)
    box = (
        watched.locator(".depthscope-chart canvas").nth(1).bounding_box()
    )  # the attribution, beside the weights
    watched.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    watched.wait_for_url(lambda url: "cause_read=" in url and "cause_read=6" not in url)
    watched.wait_for_selector("text=/Layer 6 .MLP. gives/", state="detached")


def test_a_click_on_a_cell_shows_its_read(static, watched):
    watched.goto(f"{static}/depth_attention?runs=full")
    watched.wait_for_selector("text=/full at step 200/")
    watched.wait_for_timeout(1_000)
    box = watched.locator(".depthscope-chart canvas").first.bounding_box()
    spot = box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"]
    watched.mouse.move(*spot)
    tip = watched.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    assert "layer 7 (attention)" in tip.inner_text() and "Depth weight" in tip.inner_text()
    watched.mouse.click(*spot)
    watched.wait_for_selector("text=Let go of this read")
    watched.wait_for_url("**focus=full*")
    watched.wait_for_selector("text=/reads give .* more than an even share/")
    watched.get_by_text("Let go of this read").click()
    watched.wait_for_function("() => !location.search.includes('focus')")


def test_cells_are_walked_with_the_keyboard(static, watched):
    watched.goto(f"{static}/depth_attention?runs=full")
    watched.wait_for_selector("text=/full at step 200/")
    watched.wait_for_timeout(1_000)
    chart = watched.locator(".depthscope-chart[tabindex='0']").first
    chart.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft"):  # from the final read and its newest source
        chart.press(key)
    tip = watched.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    told = tip.inner_text()
    chart.press("ArrowRight")
    watched.wait_for_function(
        "told => document.querySelector('#vg-tooltip-element').innerText !== told", arg=told
    )
    chart.press("Enter")
    watched.wait_for_selector("text=Let go of this read")


def test_a_tick_in_the_table_shows_a_run(static, watched):
    watched.goto(f"{static}/?runs=full")
    watched.wait_for_selector(CHART, timeout=30_000)
    table = watched.locator("[data-testid=stDataFrame]").first
    table.scroll_into_view_if_needed()
    watched.wait_for_timeout(1_000)
    box = table.bounding_box()
    watched.mouse.click(box["x"] + 17, box["y"] + 53)  # newest first: block
    watched.wait_for_url("**runs=full&runs=block*")
    watched.wait_for_selector("text=/in full .*in block|in block .*in full/")
    assert watched.locator(".stSidebar [data-tag]:visible").all_inner_texts() == ["full", "block"]
