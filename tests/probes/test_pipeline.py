"""Stages of a pipeline, as far as one process can have them; test_distributed.py has those of several."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

import probes
from probes.finding import find_sites
from probes.pipeline import stages_of
from probes.stages import Span, judge, told_of, whole
from tests.probes import ranks_stages
from tests.probes.models import decoder, hooks_on, loss_of, sgd
from tests.probes.ranks_played import assert_alike
from tests.probes.ranks_stages import MICRO, STEPS, TWO_STAGES, cut, made, scheduled, tokens, trained


def place(index: int, count: int) -> SimpleNamespace:
    return SimpleNamespace(index=index, count=count)


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["1f1b", "interleaved", "looped"])
def test_a_pipeline_in_one_process_is_the_model(kind, alone, tmp_path):
    count = 2 if kind in TWO_STAGES else 1
    models = [made("") if count == 1 else cut(made(""), index) for index in range(count)]
    stages = [PipelineStage(model, i, count, torch.device("cpu")) for i, model in enumerate(models)]
    optimizers, schedule = [sgd(model) for model in models], scheduled(kind, stages)
    if kind == "looped":  # one of all
        optimizers = [sgd(torch.nn.ModuleList(models))]
    hooks, own = [hooks_on(model) for model in models], [set(vars(stage)) for stage in stages]
    with probes.record(
        schedule, tmp_path / "run", optimizer=optimizers, every=2, matrices_every=2, strict=True
    ) as recorder:
        for step in range(STEPS):
            losses = trained(schedule, optimizers, tokens(step, 0), True, True)
            recorder.log(loss=torch.stack(losses).mean(), stage=1)
    assert [hooks_on(model) for model in models] == hooks, "nothing stays on a model"
    assert [set(vars(stage)) for stage in stages] == own, "nor on its stage"
    ranks_stages.run_alone("", tmp_path / "run-single", 1)
    assert_alike(tmp_path, "run", staged=True)
    assert probes.open_run(tmp_path / "run").layers == probes.open_run(tmp_path / "run-single").layers


def test_several_stages_are_no_run_of_one_process(alone, tmp_path):
    parts = [PipelineStage(cut(made(""), i), i, 2, torch.device("cpu")) for i in range(2)]
    with pytest.raises(probes.RunError, match="one stage of a pipeline in each process, and this one has 2"):
        probes.record(scheduled("looped", parts), tmp_path / "run", ranks="local")
    assert not (tmp_path / "run").exists()
    assert stages_of(made("")) == []


@pytest.mark.parametrize("schedule", [ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble])
def test_schedules_with_divided_backward_passes_are_refused(schedule, alone, tmp_path):
    parts = [PipelineStage(cut(made(""), i), i, 2, torch.device("cpu")) for i in range(2)]
    with pytest.raises(probes.RunError, match="ZeroBubble takes the gradients of inputs and of parameters"):
        probes.record(schedule(parts, MICRO, loss_fn=loss_of), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_are_numbered_through_all_stages():
    told = [told_of(find_sites(cut(made("experts"), i), staged=True), place(i, 2)) for i in range(2)]
    sites = find_sites(cut(made("experts"), 0), staged=True)
    everything, model = whole(told, sites), find_sites(made("experts"))
    assert everything.layout == model.layout
    assert [site.given for site in everything.layers] == [site.given for site in model.layers]
    spans = [Span.of(told, index) for index in range(2)]
    # The state between them is told of by the stage that receives it, and what a stage is given is no embedding.
    assert [span.rows("state") for span in spans] == [
        (slice(0, 2), slice(0, 2)),
        (slice(0, 7), slice(2, 9)),
    ]
    assert [span.rows("output") for span in spans] == [
        (slice(0, 3), slice(0, 3)),
        (slice(1, 7), slice(3, 9)),
    ]


def test_layers_that_share_names_are_told_apart():
    told = [told_of(find_sites(cut(made(""), 1), staged=True), place(index, 2)) for index in range(2)]
    names = [site.layer.name for site in whole(told, find_sites(made(""))).layers]
    assert len(set(names)) == 12 and names[0] == "stage 0: blocks.1.query + output"


def test_what_is_no_pipeline_is_refused():
    one, two = ({"index": i, "count": 2, "layers": [], "experts": [], "change": ""} for i in range(2))
    assert judge([[], []]) == [] and judge([[two], [one]]) == [one, two]
    assert judge([[one, two], [one, two]]) == judge([[one, two]]) == [one, two]
    with pytest.raises(probes.RunError, match="Rank 1 records no stage of a pipeline, and others do"):
        judge([[one], []])
    with pytest.raises(probes.RunError, match="No process records stage 1 of 2"):
        judge([[one], [one]])
    with pytest.raises(probes.RunError, match="Stage 0 of 2 is not held alike"):
        judge([[one], [one], [two]])
    first = decoder("full")
    first.residual.reads = first.residual.reads[:-1]  # the last stage has the final one
    with pytest.raises(probes.RunError, match="a stack of sources and no state"):
        find_sites(first, staged=True)
    with pytest.raises(probes.RunError, match="a stack of sources and no state"):
        told_of(find_sites(decoder("full")), place(0, 2))
