"""Stages of a pipeline, as far as one process can have them; test_distributed.py has those of several."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import probes
from probes.finding import find_sites
from probes.pipeline import Pipeline
from probes.stages import Span, judge, told_of, whole
from tests.probes import ranks_stages
from tests.probes.models import decoder, hooks_on, loss_of, sgd
from tests.probes.ranks_stages import MICRO, STEPS, cut, made, tokens


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_pipeline_of_one_stage_is_the_model(alone, tmp_path):
    model = made("")
    optimizer, hooks = sgd(model), hooks_on(model)
    stage = PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO, loss_fn=loss_of)
    own = set(vars(stage))
    with probes.record(schedule, tmp_path / "run", optimizer=optimizer, every=2, strict=True) as recorder:
        for step in range(STEPS):
            losses: list[torch.Tensor] = []
            schedule.step(tokens(step, 0), target=tokens(step, 0), losses=losses)
            ranks_stages.clip(model)
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=torch.stack(losses).mean())
    assert hooks_on(model) == hooks and set(vars(stage)) == own, (
        "nothing stays on the model, nor on its stage"
    )
    ranks_stages.run_alone("", tmp_path / "alone", 1)
    run, plain = probes.open_run(tmp_path / "run"), probes.open_run(tmp_path / "alone")
    for name in ("hidden_rms", "output_grad_rms", "param_grad_norm", "grad_norm", "clip_factor", "loss"):
        np.testing.assert_allclose(run[name], plain[name], rtol=1e-5, err_msg=name)


def test_several_stages_in_one_process_are_refused(alone, tmp_path):
    parts = [PipelineStage(cut(made(""), i), i, 2, torch.device("cpu")) for i in range(2)]
    schedule = ScheduleInterleaved1F1B(parts, MICRO, loss_fn=loss_of)
    with pytest.raises(probes.RunError, match="runs 2 stages in this process"):
        probes.record(schedule, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert Pipeline.of(made("")) is None


def test_layers_are_numbered_through_all_stages():
    told = [told_of(find_sites(cut(made("experts"), i), staged=True), i, 2) for i in range(2)]
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
    told = [told_of(find_sites(cut(made(""), 1), staged=True), index, 2) for index in range(2)]
    names = [site.layer.name for site in whole(told, find_sites(made(""))).layers]
    assert len(set(names)) == 12 and names[0] == "stage 0: blocks.1.query + output"


def test_what_is_no_pipeline_is_refused():
    one, two = ({"index": i, "count": 2, "layers": [], "experts": [], "change": ""} for i in range(2))
    assert judge([None, None]) is None and judge([two, one]) == [one, two]
    with pytest.raises(probes.RunError, match="Rank 1 records no stage of a pipeline, and others do"):
        judge([one, None])
    with pytest.raises(probes.RunError, match="No process records stage 1 of 2"):
        judge([one, one])
    with pytest.raises(probes.RunError, match="Stage 0 of 2 is not held alike"):
        judge([one, one, two])
    with pytest.raises(probes.RunError, match="a stack of sources and no state"):
        told_of(find_sites(decoder("full")), 0, 2)
