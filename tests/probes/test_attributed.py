"""Attribution in a run: by the command, in its own file, resumed, checked; other people's models; what cannot be."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

import probes
from app.checkpoints import checkpoints
from app.cli import main
from app.sequences import check_vocabulary, sequences
from app.training import DecoderConfig, RecordedTraining, Schedule, TrainingConfig, in_turn
from attnres import Corpus
from probes import attributed, checking
from probes.attributed import ABLATION, METHODS, REMOVAL, Attribution
from probes.attribution import attribute
from probes.manifest import RANK_FOLDER
from tests.attnres.models import RESIDUALS, lively_decoder, tokens

ROOT = Path(__file__).parents[2]
TEXT = bytes(range(32, 127)) * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two runs of four layers, trained two steps, with a checkpoint after each."""
    root = tmp_path_factory.mktemp("attributed")
    (root / "text.txt").write_bytes(TEXT)
    corpus = Corpus.from_path(root / "text.txt")
    shape = {"width": 16, "blocks": 2, "heads": 2, "kv_heads": 1, "context": 16}
    in_turn(
        [
            RecordedTraining(
                root / kind,
                DecoderConfig(residual=kind, **shape),
                TrainingConfig(steps=2, batch=2, context=16, validation_batches=1),
                corpus,
                Schedule(checkpoint_every=1),
            )
            for kind in ("full", "prenorm", "deepnorm")
        ]
    )
    return root


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copy(trained / "text.txt", tmp_path / "text.txt")
    return Path(shutil.copytree(trained / "full", tmp_path / "full"))


def said(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["attribute", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def asked(run: Path, *more) -> tuple[int, str]:
    return said(run, "--data", run.parent / "text.txt", "--sequences", 2, *more)


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / RANK_FOLDER).iterdir()}


# Into the run, by the command


def test_from_training_to_the_file(run):
    before = shards(run)
    code, told = asked(run, "--methods", "all", "--samples", 1, "--steps", 2, "--what-if")
    assert code == 0, told
    assert shards(run) == before
    assert re.search(r"forwards and \d+ with backward, 2 of 2 sequences at a time; about \d+ s and", told)
    (found,) = probes.open_run(run).attributions()
    assert found.step == 2 and found.about.sequences == 2 and found.about.tokens == 16
    assert set(found.edges) == set(METHODS) - {REMOVAL} and set(found.layers) == set(METHODS) - {ABLATION}
    assert np.isfinite(found.layers[REMOVAL]).all() and found.edges[ABLATION].shape == (5, 5)
    assert np.isfinite(found.edges_token_std[ABLATION][found.layout.triangle()]).all()
    assert np.nansum(found.weight, 1) == pytest.approx(1, abs=1e-5)
    assert np.nansum(found.share, 1) == pytest.approx(
        1, abs=1e-4
    ) and found.final_share.sum() == pytest.approx(1, abs=1e-4)
    for curve in found.curves.values():
        ends = {ranking: np.atleast_2d(values)[:, [0, -1]] for ranking, values in curve.values.items()}
        assert {"random", "attribution"} <= set(ends)
        for values in ends.values():  # with all or nothing left, no ranking counts
            assert values == pytest.approx(np.broadcast_to(ends["random"][0], values.shape), rel=1e-5)
    assert checking.check(run).defects == [] and "1 attribution," in str(checking.check(run))
    again = asked(run, "--methods", "all", "--samples", 1, "--steps", 2, "--what-if")
    assert again[0] == 0 and "Attributed already" in again[1]
    assert [path.name for path in (run / attributed.FOLDER).iterdir()] == [found.name]


def test_the_file_holds_what_the_function_found(run):
    asked(run, "--methods", "ablation,removal", "--step", 7)
    (read,) = probes.open_run(run).attributions()
    model = lively_decoder(blocks=2, **RESIDUALS["full"])
    found = attribute(model, tokens(), methods=[ABLATION, REMOVAL])
    path = attributed.attribution_path(run, 9, "0123456789ab")
    attributed.write_attribution(path, Attribution(**{**vars(found), "step": 9, "layout": read.layout}))
    back = probes.open_run(run).attributions()[-1]
    assert [each.step for each in probes.open_run(run).attributions()] == [7, 9]
    np.testing.assert_allclose(back.edges[ABLATION], found.edges[ABLATION], rtol=1e-6)
    np.testing.assert_allclose(back.layers_std[REMOVAL], found.layers_std[REMOVAL], rtol=1e-6)
    assert back.about.value == found.about.value and back.layers.keys() == {REMOVAL}


def test_a_dry_run_leaves_nothing(run):
    code, told = asked(run, "--dry-run")
    assert code == 0 and "sequences at a time; about" in told
    assert not (run / attributed.FOLDER).exists()


def test_every_checkpoint_of_a_folder(run):
    assert asked(run, "--methods", "gradient", "--checkpoint", run / "checkpoints")[0] == 0
    assert [found.step for found in probes.open_run(run).attributions()] == [1, 2]


def test_a_dry_run_tells_of_every_checkpoint(run):
    code, told = asked(run, "--dry-run", "--checkpoint", run / "checkpoints")
    assert code == 0 and "Step 1 of" in told and "Step 2 of" in told and "All 2 checkpoints: about" in told
    assert not (run / attributed.FOLDER).exists()


def test_a_changed_model_is_another_question(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from tests.probes.test_attributed import own\n\n\ndef build():\n    return own()[0]\n"
    for source, found in ((code, 1), (code, 1), (code + "\n\nCHANGED = True\n", 2)):
        (tmp_path / "changing.py").write_text(source)
        sys.modules.pop("changing", None)
        importlib.invalidate_caches()
        done, told = asked(run, "--model", "changing:build", "--methods", "gradient")
        assert done == 0 and len(probes.open_run(run).attributions()) == found
    assert "Attributed already" not in told


def test_a_logit_and_a_difference(run):
    for target, given, name in (
        ("token", ["--token", 40], "logit of token 40 at position -1"),
        (
            "difference",
            ["--token", 40, "--token", 41],
            "logit of token 40 minus that of token 41 at position -1",
        ),
    ):
        code, told = asked(run, "--target", target, *given, "--methods", "removal")
        assert code == 0, told
        assert name in [found.about.target for found in probes.open_run(run).attributions()]


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.long
def test_a_killed_command_goes_on(run):
    command = [sys.executable, "-m", "app", "attribute", str(run), "--data", str(run.parent / "text.txt")]
    command += [
        "--sequences",
        "2",
        "--methods",
        "shapley",
        "--samples",
        "24",
        "--model",
        "tests.probes.test_attributed:slow",
    ]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=here, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(run.glob("attribution/.*.parts")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not probes.open_run(run).attributions() and checking.check(run).defects == []
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert "is done already" in done.stderr and len(probes.open_run(run).attributions()) == 1


# What cannot be


def test_bad_input_is_one_sentence_before_any_work(run, trained):
    other = checkpoints(trained / "prenorm")[0]
    (run.parent / "short.txt").write_bytes(b"short")
    np.save(run.parent / "wide.npy", np.full((4, 32), 300))
    np.save(run.parent / "real.npy", np.ones((4, 32)))
    (run.parent / "junk.pt").write_bytes(b"junk")
    (run.parent / "empty.npy").write_bytes(b"")
    (run.parent / "junk.safetensors").write_bytes(b"junk")
    save_file({"a": np.arange(64), "b": np.arange(64)}, run.parent / "two.safetensors")
    for given, wanted in (
        (["--methods", "lime"], "There is no method lime: choose among gradient"),
        (["--target", "beauty"], "There is no target beauty: choose among loss, token, difference"),
        (["--target", "difference", "--token", 1], "is about 2 tokens: give --token twice"),
        (["--target", "token", "--token", 999], "There is no logit of token 999"),
        (["--mass", "lost"], "There is no mass lost"),
        (
            ["--checkpoint", other],
            "is of another model: it has no residual.reads.0.query, which the model has",
        ),
        (["--checkpoint", run / "nowhere"], "There is no checkpoint"),
        (["--checkpoint", run.parent / "junk.pt"], "cannot be read as a checkpoint"),
        (["--data", run.parent / "short.txt"], "holds 5 tokens, and 2 sequences of 16 take 32"),
        (["--data", run.parent / "wide.npy"], "holds the token 300, and the model knows 256 tokens"),
        (["--data", run.parent / "real.npy"], "token ids are integers"),
        (["--data", run.parent / "none.txt"], "There is no file"),
        (["--data", run.parent / "empty.npy"], "empty.npy cannot be read: it is no array that numpy saved."),
        (["--data", run.parent / "junk.safetensors"], "junk.safetensors cannot be read: "),
        (["--data", run.parent / "two.safetensors"], "it holds 2 tensors, not one of token ids"),
        (["--checkpoint", run / "checkpoints", "--step", 3], "--step is of one checkpoint"),
        (
            ["--model", "tests.probes.test_attributed:failing"],
            "failed on one sequence of the batch: KeyError: 'mask'",
        ),
        (["--context", 17], "--context 17 is more than the model of full takes: at most 16"),
        (["--memory", "1MB"], "Too little memory"),
        (["--device", "abacus"], "The device 'abacus' cannot be used here: "),
        (["--memory", "much"], "is no size"),
        (["--methods", "integrated", "--mass", "shared"], 'need mass="kept"'),
        (["--model", "nowhere:build"], "There is no module 'nowhere'"),
        (["--model", "tests.probes.test_attributed:wider"], "is not the one that full was recorded of"),
    ):
        code, told = asked(run, *given)
        assert code and wanted in told and told.count("\n") <= 4, (given, told)
    assert not (run / attributed.FOLDER).exists()
    assert "There is no run at" in said(run.parent / "nothing")[1]


def failing():
    model = own()[0]
    model.register_forward_pre_hook(lambda module, args: {}["mask"])
    return model


def test_shorter_sequences_are_taken_whole_where_no_length_is_asked_for(tmp_path):
    np.save(tmp_path / "short.npy", np.arange(20).reshape(4, 5))
    assert sequences(tmp_path / "short.npy", 2, 16, or_fewer=True).tolist() == [[*range(5)], [*range(15, 20)]]
    assert sequences(tmp_path / "short.npy", 2, 3, or_fewer=True).shape == (2, 3)
    with pytest.raises(probes.RunError, match="2 of 16 are asked for"):
        sequences(tmp_path / "short.npy", 2, 16)


def test_positions_are_not_taken_for_a_vocabulary():
    class Embedded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.token = torch.nn.Embedding(8, 4), torch.nn.Embedding(50, 4)

    check_vocabulary(Embedded(), torch.tensor([49]), "text")
    with pytest.raises(probes.RunError, match="the model knows 50 tokens"):
        check_vocabulary(Embedded(), torch.tensor([50]), "text")


def test_batches_of_any_kind_of_numbers_have_a_digest():
    from app.attributing import _bytes

    x = torch.arange(6.0).view(2, 3)
    assert _bytes(x) == x.numpy().tobytes() and _bytes(x.t()) == x.t().contiguous().numpy().tobytes()
    assert len(_bytes(x.bfloat16().requires_grad_())) == 12 and len(_bytes(torch.tensor(True))) == 1


def wider():
    return lively_decoder(blocks=3, **RESIDUALS["full"])


def test_a_run_without_a_configuration_asks_for_the_model(run):
    from probes.jsonfile import write_json

    told = json.loads((run / "run.json").read_text())
    told.pop("crc32")
    for config, wanted in (
        ({}, "was recorded without its model"),
        ({"hidden_size": 3}, "is of a model of your own"),
    ):
        write_json(run / "run.json", told | {"config": config})
        code, output = asked(run)
        assert code == 1 and wanted in output and "--model module:function" in output
    shutil.rmtree(run / "checkpoints")
    assert "has saved no checkpoint" in asked(run)[1]


def test_a_model_of_ones_own_with_its_batch(run):
    code, told = said(
        run,
        "--model",
        "tests.probes.test_attributed:own",
        "--methods",
        "removal",
        "--what-if",
        "--device",
        "cpu",
    )
    assert code == 0, told
    (found,) = probes.open_run(run).attributions()
    assert found.about.data == "batch of tests.probes.test_attributed:own" and found.about.sequences == 2


def own():
    from attnres import Decoder

    shape = {"width": 16, "blocks": 2, "heads": 2, "kv_heads": 1, "context": 16}
    return Decoder(DecoderConfig(residual="full", **shape)), torch.randint(256, (4, 12))


def test_a_loss_of_ones_own(run):
    code, told = said(run, "--model", "tests.probes.test_attributed:with_loss", "--methods", "removal")
    assert code == 0, told
    (found,) = probes.open_run(run).attributions()
    assert found.about.unit == "units of the target" and found.about.value == pytest.approx(7.0)


def with_loss():
    model, batch = own()
    return {"model": model, "batch": batch, "loss": lambda logits: 7 + 0 * logits.mean()}


def slow():
    model = own()[0]
    model.register_forward_hook(lambda *_: time.sleep(0.1))
    return model


# Broken files


def test_a_changed_file_is_left_out_and_told(run):
    asked(run, "--methods", "removal")
    asked(run, "--methods", "gradient")
    opened = probes.open_run(run)
    path = run / attributed.FOLDER / opened.attributions()[0].name
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.unlink()
    path.write_bytes(data)
    opened = probes.open_run(run)
    assert len(opened.attributions()) == 1
    assert "is left out: it does not match its checksum" in opened.attribution_problems[0]
    found = checking.check(run)
    assert len(found.defects) == 1 and "The attribution" in str(found.defects[0])
    assert "was put aside" in checking.repair(found)[0]
    assert checking.check(run).defects == [] and (run / "quarantine" / "attribution" / path.name).exists()


def test_hostile_files_are_refused(run):
    from probes.shard import write_shard

    folder = run / attributed.FOLDER
    folder.mkdir()
    about = json.dumps({"value": "1.0"})
    for number, (tensors, told) in enumerate(
        (
            ({"edges.ablation": np.ones(3, np.float32)}, about),
            ({"layers.removal": np.ones((2, 4), np.float32)}, about),
            ({"without.layers.weight": np.ones(3, np.float32)}, about),
            ({"without.layers.count": np.arange(3), "without.layers.random": np.ones(3, np.float32)}, about),
            ({}, json.dumps({"value": "1.0", "sequences": "many"})),
            ({}, json.dumps({"value": 10**400})),
            ({}, json.dumps({"value": "1.0", "created": 10**400})),
            ({}, "[" * 100_000),
            ({}, ""),
        )
    ):
        name = f"{5:012d}-{number:012x}.safetensors"
        write_shard(folder / name, tensors, {"format": "2", "step": "5", "about": told})
    write_shard(folder / f"{6:012d}-{1:012x}.safetensors", {}, {"format": "2", "step": "5", "about": about})
    opened = probes.open_run(run)
    assert opened.attributions() == [] and len(opened.attribution_problems) == 10
    assert len(checking.check(run).defects) == 10


def test_the_docs_way_to_read_it(run, monkeypatch, capsys):
    asked(run, "--methods", "removal")
    (run.parent / "runs" / "mine").mkdir(parents=True)
    run.rename(run.parent / "runs" / "mine" / "full")
    monkeypatch.chdir(run.parent)
    page = (ROOT / "docs" / "attribution.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)[1]
    exec(compile(code, "docs/attribution.md", "exec"), {"probes": probes})
    assert capsys.readouterr().out.startswith("2 loss [")


def test_the_help_names_every_method_and_target():
    from app.asking import TARGETS

    told = said("--help")[1]
    assert all(name in told for name in (*METHODS, *TARGETS))
