"""Several processes train one model: what is recorded is what one process records of the same batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import probes
from app.cli import main
from probes import checking
from probes import manifest as files
from probes.vocabulary import METRICS, OF_ONE
from tests.probes import plain_reader
from tests.probes.models import decoder, sgd, train
from tests.probes.ranks_played import assert_alike, play, told

SHORT = [
    *("ddp", "inner", "fsdp-masked-accumulate", "one_group-accumulate", "tp", "sp"),
    *("views", "unused-found", "one_group-experts", "1f1b-plain-experts", "interleaved-plain-experts"),
    *("checkpointed_fsdp-accumulate", "offloaded-scaled", "one_group-found", "fsdp-found"),
]
BROKEN = ["ddp-inf", "tp-inf", "sp-inf", "gpipe-plain-inf"]
SCENES = [
    *("nothing", "asked", "refused", "stages", "resumed", "joined", "counted", "saved", "half", "unknown"),
    *("local-ddp", "one", "raises", "slow", "homeless", "gone", "blank", "joins", "older", "dead"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every case, and every scene, by the same two processes: starting them is what takes time."""
    return play(tmp_path_factory.mktemp("two"), 2, *SHORT, *BROKEN, *SCENES)


@pytest.mark.parametrize("case", SHORT)
def test_every_metric_is_that_of_one_process_on_the_same_batch(case, two):
    assert_alike(two, case)


def test_no_metric_is_forgotten(two):
    """Each metric of the vocabulary is of one process alone, or among those that the cases above have compared."""
    compared = {name for case in SHORT for name in probes.open_run(two / case).metrics}
    assert set(METRICS) - compared == {"tokens", "val_loss"} and {"tokens", "val_loss"} < set(OF_ONE)


@pytest.mark.parametrize("case", BROKEN)
def test_values_that_are_not_finite_are_counted_once(case, two):
    run, alone = probes.open_run(two / case), probes.open_run(two / f"{case}-single")
    assert alone["nonfinite"][0].max() > 0
    np.testing.assert_array_equal(run["nonfinite"], alone["nonfinite"])


def test_stages_are_one_model(two):
    run, alone = (probes.open_run(two / f"1f1b-plain-experts{end}") for end in ("", "-single"))
    assert run.layers == alone.layers and len(run.layers) == 8
    assert run.manifest.ranks.parallel == {"by": [], "data": 1, "meshes": [], "stages": 2}
    # Rank 0 has the first stage, and knows no loss.
    assert run.steps("loss").tolist() == [0, 1, 2, 3] and run["stage"].tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(run["loss"], alone["loss"], rtol=1e-5)


def test_one_packed_collective_a_recorded_step(two):
    """Of every second step; with matrices, every fourth, one more and a sample. None in the thread that trains."""
    for seen, sample in zip(told(two, "counted"), ("recv", "send"), strict=True):
        matrices = ["allreduce", "allreduce", sample]
        assert seen["ours"] == [matrices, [], ["allreduce"], [], matrices, []]
        assert seen["theirs"] == [0] * 6


def test_a_checkpoint_in_between_changes_nothing(two):
    norms, _ = told(two, "saved")
    plain, saved = (probes.open_run(two / "saved" / name) for name in ("without", "with"))
    np.testing.assert_allclose(saved["grad_norm"], norms[4:], rtol=1e-5)
    np.testing.assert_allclose(saved["clip_factor"], 0.01 / np.array(norms[4:]), rtol=1e-4)
    assert plain.metrics == saved.metrics
    for name in set(saved.metrics) - {"wall_time", "step_time", "probe_time"}:
        np.testing.assert_array_equal(saved[name], plain[name], err_msg=name)


def test_parameters_in_bfloat16(two):
    """What FSDP2's policy rounds is no other model."""
    run = probes.open_run(two / "half")
    assert 1e-3 < run["identity_error"].max() < 1e-2 and np.isfinite(run["depth_attribution"]).any()
    whole = probes.open_run(two / "resumed")
    np.testing.assert_allclose(run["hidden_rms"][0], whole["hidden_rms"][0], rtol=1e-2)


def test_a_run_says_how_it_was_trained(two):
    ranks = {case: probes.open_run(two / case).manifest.ranks for case in SHORT}
    assert all(each.world == 2 and each.values == "merged" for each in ranks.values())
    assert ranks["ddp"].parallel == {"by": ["DistributedDataParallel"], "data": 2, "meshes": []}
    assert ranks["tp"].parallel == {"by": [], "data": 1, "meshes": [{"shape": [2], "names": ["tp"]}]}
    assert ranks["one_group-accumulate"].parallel["by"] == ["fully_shard"]
    assert {"hidden_rms", "grad_norm"} <= set(ranks["ddp"].merged) and not set(OF_ONE) & set(
        ranks["ddp"].merged
    )
    assert probes.open_run(two / "ddp-single").manifest.ranks.world == 1
    assert "ranks" not in json.loads((two / "ddp-single" / files.MANIFEST).read_text())


def test_rank_0_writes_and_the_others_say_that_they_live(two):
    run = probes.open_run(two / "ddp")
    assert run.ranks == {0: ("finished", ""), 1: ("finished", "")}
    assert sorted(path.name for path in (two / "ddp" / "rank-00001").iterdir()) == [
        files.END,
        files.HEARTBEAT,
    ]
    assert "1 shard of 2 ranks" in str(checking.check(two / "ddp"))
    assert np.unique(run["loss"]).tolist() == [1], "what the script logs is rank 0's"
    rows = plain_reader.read(two / "ddp")["hidden_rms"]
    np.testing.assert_array_equal([row for _, row in rows], run["hidden_rms"])


def test_a_batch_without_sequences_adds_nothing(two):
    run = probes.open_run(two / "nothing")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2] and not run.problems
    assert np.isfinite(run["hidden_rms"]).all() and np.isfinite(run["mixing_share"][:, -1]).all()


def test_a_mask_that_hides_all_of_one_process_adds_nothing(two):
    run = probes.open_run(two / "blank")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2] and not run.problems
    assert all(np.isfinite(run[name]).all() for name in ("hidden_rms", "output_grad_rms", "grad_norm"))
    # Step 1 is of rank 0's tokens alone, as recorded beside it where rank 1 has no sequence at all.
    nothing = probes.open_run(two / "nothing")
    np.testing.assert_allclose(run["hidden_rms"][1], nothing["hidden_rms"][1], rtol=1e-5)


def test_a_process_with_fewer_batches_ends_what_is_of_all(two):
    run = probes.open_run(two / "joins")
    first, second = told(two, "joins")
    assert first == second, "the same parameters, after five steps and after three"
    assert run.steps("grad_norm").tolist() == [0, 1, 2] and run.steps("lr").tolist() == [0, 1, 2, 3, 4]
    assert run.status == "finished" and run.ranks[1] == ("finished", "")
    assert run.problems[0].startswith("Steps 3 to 4 are missing: another process is gone")


def test_wrappers_that_hide_their_parameters_are_refused(two):
    seen, _ = told(two, "older")
    assert "FullyShardedDataParallel shows no parameter whole" in seen["fsdp"]
    assert "DistributedDataParallel over a model with DTensors" in seen["sliced"]


def test_a_step_that_one_process_alone_wants_is_let_go(two):
    run = probes.open_run(two / "asked")
    assert run.steps("hidden_rms").tolist() == [0, 4] and run.status == "finished"
    assert run.problems == ["Steps 2 to 2 are missing: not all processes recorded it."]


def test_refusals_are_of_all(two):
    first, second = told(two, "refused")
    assert {name: text.removesuffix(" (Rank 1 says so.)") for name, text in first.items()} == second
    assert "already holds a run" in first["again"] and "other steps to record" in first["every"]
    assert "goes on at another step than rank 0: load the same checkpoint" in first["step"]
    assert "ranks='local'" in first["stages"] and "No transformer layers were found" in first["ill"]
    assert "give 'merged'" in first["word"] and first["places"] == ""
    assert "is being recorded by process" in first["second"] and "Not a directory" in first["nowhere"]
    assert "the schedule that runs them" in first["stages"]


def test_each_process_its_own(two):
    """Pipeline stages: the layers of each, and what each saw of them."""
    runs = [probes.open_run(two / "stages", rank) for rank in range(2)]
    assert [len(run.layers) for run in runs] == [2, 4] and runs[0].manifest.ranks.values == "local"
    assert [run["hidden_rms"].shape for run in runs] == [(2, 3), (2, 5)]
    assert not checking.check(two / "stages").defects
    with pytest.raises(
        probes.RunError, match="no rank 2: it was recorded by 2 processes, of each rank alone"
    ):
        probes.open_run(two / "stages", 2)


def test_one_process_may_record_alone(two):
    seen, _ = told(two, "one")
    assert "Of 2 processes rank 1 did not call probes.record within 0.5 s" in seen["waited"]
    assert "each process holds a part" in seen["whole"]
    run = probes.open_run(two / "one")
    assert (run.manifest.ranks.world, run.manifest.ranks.values, run.ranks) == (2, "one", {})
    # The gradients as they are when all have been averaged.
    np.testing.assert_allclose(run["grad_norm"][-1], seen["norm"], rtol=1e-5)


def test_local_values_merge_to_those_of_all(two):
    parts = [probes.open_run(two / "local-ddp", rank) for rank in range(2)]
    whole = np.sqrt(np.mean([part["hidden_rms"] ** 2 for part in parts], 0))
    np.testing.assert_allclose(whole, probes.open_run(two / "ddp")["hidden_rms"], rtol=1e-5)
    np.testing.assert_allclose(parts[0]["grad_norm"], parts[1]["grad_norm"], rtol=1e-6)
    assert parts[1]["loss"].tolist() == [2, 2, 2]


def test_a_run_of_several_is_continued(two):
    run = probes.open_run(two / "resumed")
    assert [(each.step, each.hidden_from) for each in run.attempts] == [(0, 2), (2, None)]
    assert run.steps("grad_norm").tolist() == [0, 1, 2, 3, 4] and run.ranks[1] == ("finished", "")
    assert "2 shards of 2 ranks in 2 attempts" in str(checking.check(run.path))


def test_a_run_goes_on_with_another_number_of_processes(two, tmp_path):
    run = probes.open_run(two / "joined")
    assert [each.manifest.ranks.world for each in run.attempts] == [2, 2]
    assert [each.manifest.ranks.values for each in run.attempts] == ["one", "merged"]
    assert run.steps("grad_norm").tolist() == [0, 1, 2, 3, 4] and not run.problems
    alone = shutil.copytree(two / "resumed", tmp_path / "run")
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, alone, optimizer=optimizer, every=1, resume=3):
        train(model, optimizer, 3, start=3)
    run = probes.open_run(alone)
    assert [(each.step, each.manifest.ranks.world) for each in run.attempts] == [(0, 2), (2, 2), (3, 1)]
    assert run.steps("hidden_rms").tolist() == [0, 1, 2, 3, 4, 5] and run.ranks == {} and not run.problems


def test_gradients_that_nobody_averages_are_not_told(two):
    run = probes.open_run(two / "unknown")
    assert run.steps("hidden_rms").tolist() == [0, 1]
    assert "grad_norm" not in run and "output_grad_rms" not in run
    assert "nothing tells" in json.dumps(run.attempts[0].told["missing"])


def test_a_process_that_raises_stops_alone(two):
    run = probes.open_run(two / "raises")
    assert run.status == "finished" and run.steps("lr").tolist() == [0, 1, 2, 3, 4, 5]
    assert run.ranks[1] == ("stopped", "ValueError: the loss is nowhere")
    assert run.problems[0] == "Rank 1 of 2 is stopped: ValueError: the loss is nowhere."
    assert run.problems[1].startswith("Steps 2 to 5 are missing: another process is gone")


def test_a_process_that_is_slow_loses_nothing(two):
    run = probes.open_run(two / "slow")
    assert run.steps("hidden_rms").tolist() == [0, 2] and run.steps("loss").tolist() == [0, 1, 2]
    assert not run.problems and not checking.check(run.path).defects


def test_a_process_without_a_folder_is_named(two):
    run = probes.open_run(two / "homeless")
    assert run.ranks[1] == ("missing", "no folder is here")
    assert run.steps("hidden_rms").tolist() == [0, 1, 2] and run.status == "finished"


def test_torch_may_be_done_before_the_recorder_is(two):
    run = probes.open_run(two / "gone")
    assert run.steps("grad_norm").tolist() == [0, 1] and run.status == "finished"


def test_the_others_outlive_a_process_that_is_killed(two, monkeypatch):
    assert told(two, "dead", 0)["steps"] == 8
    assert not (two / "dead.1.json").exists()
    monkeypatch.setattr(files, "SILENT_SECONDS", 0)
    run = probes.open_run(two / "dead")
    recorded = run.steps("hidden_rms").tolist()
    assert run.status == "finished" and recorded == [0, 1, 2][: len(recorded)]
    assert run.steps("lr").tolist() == list(range(8)), "what is rank 0's own is recorded to the end"
    assert any(text.startswith("Rank 1 of 2 is stopped: no sign of life") for text in run.problems)
    assert any("to 7 are missing: another process is gone" in text for text in run.problems)
    assert not checking.check(run.path).defects


# Runs of several processes on the disk


@pytest.fixture
def stages(two, tmp_path):
    """The run of two pipeline stages, to be damaged."""
    return Path(shutil.copytree(two / "stages", tmp_path / "run"))


def test_a_check_reads_the_files_of_every_rank(stages):
    (bad,) = (stages / "rank-00001").glob("0*.safetensors")
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    (stages / "rank-00001" / "notes.txt").write_text("mine")
    found = checking.check(stages)
    (defect,) = found.defects
    assert "does not match its checksum" in defect.sentence and defect.damaged
    assert any("rank-00001/notes.txt is no file of a run" in note for note in found.notes)
    assert checking.repair(found) == [f"{bad.name} was put aside: quarantine/rank-00001/{bad.name}."]
    assert "in quarantine" in probes.open_run(stages, 1).problems[0]
    assert not probes.open_run(stages).problems


def test_a_digest_is_made_of_every_rank(stages):
    """Also of one with other layers than rank 0."""
    wanted = {rank: probes.open_run(stages, rank)["hidden_rms"] for rank in range(2)}
    assert CliRunner().invoke(main, ["compact", str(stages)]).exit_code == 0
    for rank in range(2):
        run = probes.open_run(stages, rank)
        assert [len(attempt.digests) for attempt in run.attempts] == [1]
        np.testing.assert_array_equal(run["hidden_rms"], wanted[rank])
    assert not checking.check(stages).defects


def test_a_sign_of_life_that_was_changed_is_named(stages):
    end = stages / "rank-00001" / files.END
    end.write_text(end.read_text().replace("finished", "Finished"))
    assert "rank-00001/end.json does not match its checksum" in checking.check(stages).defects[0].sentence


def test_a_rank_that_never_came_is_named(stages):
    shutil.rmtree(stages / "rank-00001")
    run = probes.open_run(stages)
    assert run.ranks[1] == ("missing", "no folder is here")
    assert run.problems == ["Rank 1 of 2 is missing: no folder is here."]
    (stages / "rank-00001").symlink_to(stages / "rank-00000")
    assert probes.open_run(stages).ranks[1][0] == "missing"
    assert "is not a folder" in checking.check(stages).defects[0].sentence
    with pytest.raises(probes.RunError, match="has no rank 1"):
        probes.open_run(stages, 1)


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        {"world": 10**9, "values": "merged"},
        {"world": 0, "values": "merged"},
        {"world": True, "values": "merged"},
        {"world": 2},
        {"world": 2, "values": "\x1b[2J"},
        {"world": 2, "values": "merged", "merged": 3},
        {"world": 2, "values": "merged", "merged": [["x"]]},
        {"world": 2, "values": "merged", "parallel": 3},
    ],
)
def test_ranks_that_nobody_wrote_are_refused(ranks, stages):
    content = json.loads((stages / files.MANIFEST).read_text())
    (stages / files.MANIFEST).write_text(json.dumps({**content, "ranks": ranks}))
    with pytest.raises(probes.RunError, match="is not a depthscope manifest"):
        probes.open_run(stages)


def test_values_of_a_later_depthscope_are_shown_as_they_are(stages):
    content = json.loads((stages / files.MANIFEST).read_text())
    ranks = {"world": 100_000, "values": "of some", "new": 1}
    (stages / files.MANIFEST).write_text(json.dumps({**content, "ranks": ranks}))
    run = probes.open_run(stages)
    assert run.manifest.ranks.values == "of some"
    assert run.problems == ["Ranks 2, 3, 4, 5, 6 and 99993 more of 100000 are missing: no folder is here."]
