"""Which steps are recorded: the law of `next`, what is written and read back, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import probes
from probes.manifest import MANIFEST
from probes.recording import record
from probes.schedule import Schedule, log_spaced, schedule
from tests.probes.models import decoder, sgd, train

FAR = 2000
intervals = st.integers(1, 500)
ranges = st.builds(range, st.integers(0, FAR), st.integers(0, FAR), st.integers(1, 50)).filter(len)
logs = st.builds(log_spaced, st.integers(1, 60))
lists = st.builds(
    lambda few, interval, log: [*interval, *few, *log],
    st.lists(ranges, max_size=3),
    st.lists(intervals, max_size=1),
    st.lists(logs, max_size=1),
).filter(len)
schedules = st.one_of(intervals, ranges, logs, lists).map(schedule)


@given(schedules, st.integers(-1, FAR))
def test_next_is_the_first_step_that_is_recorded(when, step):
    following = when.next(step)
    between = range(step + 1, FAR if following is None else following)
    assert not any(map(when, between))
    assert following is None or (following > step and when(following))
    assert when(0)


@given(schedules)
def test_it_comes_back_from_json(when):
    assert Schedule.from_json(json.loads(json.dumps(when.to_json()))) == when
    assert str(when)


@given(lists, st.integers(0, FAR))
def test_a_list_is_all_of_its_parts(parts, step):
    assert schedule(parts)(step) == any(schedule(part)(step) for part in parts)
    assert schedule(parts).count(50) == sum(any(schedule(p)(s) for p in parts) for s in range(50))


def test_far_out_the_steps_are_still_evenly_spaced_on_a_log_axis():
    when, step, found = log_spaced(10), 10**9, []
    while step < 10**10:
        step = when.next(step)
        found.append(step)
    assert len(found) == 10 and found[-1] == 10**10 and all(map(when, found))
    assert not any(when(step + 1) for step in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (1, "every step"),
        (10, "every 10 steps"),
        ([range(100), 10], "steps 0–99 and every 10 steps"),
        ((range(200, 300, 5), range(7, 8)), "every 5 steps from 200 to 295 and step 7"),
        ([log_spaced(20), 1000], "every 1000 steps and 20 steps per factor of ten"),
    ],
)
def test_in_words(given, words):
    assert str(schedule(given)) == words


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "every is 0: give a whole number of steps, 1 or more, a range of steps, or a list of both."),
        (-3, "every is -3: give"),
        (2.5, "every is 2.5: give"),
        (True, "every is True: give"),
        ("10", "every is '10': give"),
        (None, "every is None: give"),
        ([], "every is []: the list is empty: give"),
        ([range(10), 0], "every is [range(0, 10), 0]: give"),
        (range(5, 5), "every is range(5, 5): range(5, 5) holds no steps to record"),
        (range(9, 0, -1), "every is range(9, 0, -1): range(9, 0, -1) holds no steps to record"),
        (range(-5, 5), "every is range(-5, 5): range(-5, 5) holds no steps to record"),
        ([10, 20, 50], "every is [10, 20, 50]: a list holds one interval at most; a single step s is range"),
    ],
)
def test_what_is_no_schedule_is_said_in_one_sentence(given, said, tmp_path):
    with pytest.raises(probes.RunError) as raised:
        probes.record(decoder(blocks=1), tmp_path / "run", every=given)
    assert str(raised.value).startswith(said) and str(raised.value).endswith(".")
    assert not (tmp_path / "run").exists()


def test_no_log_spacing():
    for density in (0, 2.5, True):
        with pytest.raises(ValueError, match="whole number of steps per factor of ten"):
            log_spaced(density)


def recorded(path, steps=12, at=lambda recorder, step: None, **schedules):
    """Steps of vectors and of matrices; `at(recorder, step)` runs between forward and optimizer step."""
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **schedules) as recorder:
        now = iter(range(steps))
        train(model, optimizer, steps, after=lambda loss: at(recorder, next(now)))
    run = probes.open_run(path)
    return run.steps("hidden_rms").tolist(), run.steps("depth_weight").tolist()


def test_a_run_follows_its_schedules(tmp_path):
    vectors, matrices = recorded(
        tmp_path / "run", every=[range(2, 5), 8], matrices_every=[range(9, 10), 1000]
    )
    assert vectors == [0, 2, 3, 4, 8, 9] and matrices == [0, 9]
    found = probes.open_run(tmp_path / "run").manifest
    assert (
        found.vectors == schedule([range(2, 5), 8]) and str(found.matrices) == "step 9 and every 1000 steps"
    )
    told = json.loads((tmp_path / "run" / MANIFEST).read_text())
    # The intervals alone mean what they meant to older readers, and of an older run they say everything.
    assert (told["every"], told["matrices_every"]) == (8, 1000)
    del told["schedule"]
    (tmp_path / "run" / MANIFEST).write_text(json.dumps(told))
    assert probes.open_run(tmp_path / "run").manifest.vectors == schedule(8)


def test_without_an_interval_an_older_reader_is_told_one(tmp_path):
    vectors, matrices = recorded(tmp_path / "run", every=log_spaced(1), matrices_every=range(3, 4))
    assert vectors == [0, 1, 3, 10] and matrices == [0, 3]
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["every"] == 1


def test_now_is_the_next_training_step(tmp_path):
    """Called between a forward and its step, also twice, on recorded and on unrecorded steps."""

    def at(recorder, step):
        if step in (2, 7):  # 3 is due anyway, 8 is not
            recorder.now()
            recorder.now()

    vectors, matrices = recorded(tmp_path / "run", at=at, every=range(3, 5), matrices_every=1000)
    assert vectors == [0, 3, 4, 8] and matrices == [0, 3, 8]


def test_now_before_the_forward_is_that_step(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, every=range(1), matrices_every=range(1)
    ) as r:
        train(model, optimizer, 3)
        r.now()
        r.now()
        train(model, optimizer, 2, start=3)
    assert probes.open_run(tmp_path / "run").steps("depth_weight").tolist() == [0, 3]


def test_now_compiles_nothing_new_under_a_schedule(tmp_path):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    when = {"every": [range(4), 1000], "matrices_every": [range(5, 7), 1000]}
    with probes.record(model, tmp_path / "run", optimizer=optimizer, **when) as recorder:
        model.compile(fullgraph=True, backend=counter)
        train(model, optimizer, 9)
        assert counter.frame_count == 3
        recorder.now()
        train(model, optimizer, 2, start=9, after=lambda loss: recorder.now())
        train(model, optimizer, 2, start=11)
    assert counter.frame_count == 3
    torch._dynamo.reset()
    assert probes.open_run(tmp_path / "run").steps("depth_weight").tolist() == [0, 5, 6, 9, 10, 11]


def test_the_examples_of_the_docs(tmp_path, monkeypatch):
    """docs/cost.md: each schedule in it is one."""
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    model = decoder(blocks=1)
    kept = []
    monkeypatch.setattr(probes, "record", lambda *args, **options: kept.append(record(*args, **options)))
    exec(code, {"probes": probes, "model": model})
    for recorder in kept:
        recorder.close()
    words = [str(probes.open_run(tmp_path / "runs" / name).manifest.vectors) for name in "abcde"]
    assert words[1] == "steps 0–99 and every 10 steps" and words[3] == "20 steps per factor of ten"
    first = [step for step in range(17) if log_spaced(20)(step)]
    assert first == [*range(12), 13, 14, 16]
    assert words[1] in page and "1, 2, … 10, 11, 13, 14, …" in page
