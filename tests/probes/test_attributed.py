"""Attribution in a run: by the command, in its own file, resumed, checked; other people's models; what cannot be."""

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

import probes
from app.checkpoints import checkpoints
from app.cli import main
from app.training import DecoderConfig, RecordedTraining, Schedule, TrainingConfig, in_turn
from attnres import Corpus
from probes import attributed, checking
from probes.attributed import ABLATION, GRADIENT, METHODS, REMOVAL, Attribution
from probes.attribution import attribute
from probes.manifest import RANK_FOLDER
from probes.parts import Parts
from tests.attnres.models import RESIDUALS, lively_decoder, tokens
from tests.probes.foreign import Foreign

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


def test_every_checkpoint_of_a_folder(run):
    assert asked(run, "--methods", "gradient", "--checkpoint", run / "checkpoints")[0] == 0
    assert [found.step for found in probes.open_run(run).attributions()] == [1, 2]


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


def test_a_difference_of_logits_is_the_difference():
    from probes.objective import logit

    model, batch = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens()
    one, two, both = (
        attribute(model, batch, methods=[REMOVAL, GRADIENT], loss=loss).layers
        for loss in (logit(3), logit(5), logit(3, minus=5))
    )
    for method in (REMOVAL, GRADIENT):
        np.testing.assert_allclose(both[method], one[method] - two[method], atol=1e-9)


# A part at a time


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "probes.attribution.seconds_of", lambda effects: (1.0, 1.0)
    )  # its forwards are not counted here
    model, batch = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens()
    whole = attribute(model, batch, methods=[ABLATION, REMOVAL])
    path, calls = tmp_path / "parts" / "x", []
    model.register_forward_hook(lambda *_: calls.append(len(calls)))

    class Interrupting(Parts):
        def __setitem__(self, name, value):
            super().__setitem__(name, value)
            if name.startswith("0.edges.ablation.2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupting(path) as parts:
        attribute(model, batch, methods=[ABLATION, REMOVAL], parts=parts)
    first, told = len(calls), []
    with Parts(path) as parts:
        kept = [name for name in parts if name != "at once"]
        found = attribute(model, batch, methods=[ABLATION, REMOVAL], parts=parts, announce=told.append)
        parts.finish()
    assert len(kept) > 4 and 0 < told[0].done < 1 and not list(path.parent.iterdir())
    left = round(told[0].forwards * (1 - told[0].done))
    assert left <= len(calls) - first <= left + 3  # a look at the stream, at the memory and at the weights
    np.testing.assert_array_equal(found.edges[ABLATION], whole.edges[ABLATION])
    np.testing.assert_array_equal(found.layers[REMOVAL], whole.layers[REMOVAL])


def test_what_a_damaged_part_held_is_computed_again(tmp_path):
    with Parts(tmp_path / "x") as parts:
        parts["a"] = np.ones(3)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] ^= 1
    (tmp_path / "x").write_bytes(data)
    assert len(Parts(tmp_path / "x")) == 0


def test_memory_bounds_what_goes_through_at_once(monkeypatch):
    from probes import budget

    model, batch, told = lively_decoder(blocks=2, **RESIDUALS["full"]), tokens(batch=5), []
    whole = attribute(model, batch, methods=[GRADIENT, ABLATION], announce=told.append)
    monkeypatch.setattr(budget, "resident", lambda: 0)
    sizes = []
    with pytest.raises(probes.RunError, match="Too little memory: one sequence takes") as refused:
        attribute(model, batch, methods=[GRADIENT], memory=1000)
    assert "Allow more, or take shorter sequences" in str(refused.value)
    one = _bytes_of_one(model, batch)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parted = attribute(model, batch, methods=[GRADIENT, ABLATION], memory=2.5 * one, announce=told.append)
    assert told[0].at_once == 5 and told[1].at_once == 2 and max(sizes) == 2
    for method in (GRADIENT, ABLATION):
        np.testing.assert_allclose(parted.edges[method], whole.edges[method], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(parted.edges_std[method], whole.edges_std[method], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(parted.weight, whole.weight, rtol=1e-6)


def _bytes_of_one(model, batch) -> int:
    from probes.budget import bytes_of_one
    from probes.effects import Effects
    from probes.finding import find_sites
    from probes.gates import Gates
    from probes.objective import next_token_losses

    gates = Gates(find_sites(model))
    with gates.hung():
        return bytes_of_one(Effects(model, (batch[:1],), {}, next_token_losses, gates))


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


# Models nobody adapted, and baselines


@pytest.mark.parametrize(
    ("layout", "size"), [("inline", None), ("committed and partial", 2), ("attention kernel", 2)]
)
def test_the_edges_of_models_that_do_not_say_where_they_read(layout, size):
    model = Foreign(layout, size=size).double()
    batch = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(1))
    found = attribute(model, batch, methods=[GRADIENT, ABLATION, REMOVAL])
    for read in model.reads:
        read.asked = True
    model(batch)
    for row, read in enumerate(model.reads):
        weight = read.weight.flatten(1).mean(1)
        if len(weight) == 1 and np.isnan(found.weight[row, 0]):
            assert np.isnan(found.edges[ABLATION][row, 0])  # of one source, and its mix is not seen
            continue
        np.testing.assert_allclose(found.weight[row, : len(weight)], weight, atol=1e-6)
    read = model.reads[-1]
    # The last read without its source 1, by the model's own weights.
    base = attribute(model, batch, methods=[REMOVAL]).loss
    mix = read.mix

    def without(sources):
        made = mix(sources)
        return made - read.weight[1].unsqueeze(-1) * sources[1]

    read.mix = without
    if layout == "committed and partial":
        read.forward = lambda done, partial=None: without(
            [*done.unbind(0), *([] if partial is None else [partial])]
        )
    with torch.no_grad():
        logits = model(batch)
        less = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    assert found.edges[ABLATION][-1, 1] == pytest.approx(less - base, rel=1e-4, abs=1e-9)
    assert found.loss == pytest.approx(base)


@pytest.mark.parametrize("residual", [None, "full", "block"])
def test_a_converted_model_has_edges(residual):
    import attnres

    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=17, num_hidden_layers=2, **shape)
    )
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens(), "attention_mask": mask}
    if residual:
        size = {"layers_per_block": 3} if residual == "block" else {}
        attnres.convert(model, residual=residual, example={"input_ids": tokens()}, **size)
    found = attribute(model, batch, methods=[GRADIENT, ABLATION, REMOVAL])
    with torch.no_grad():
        (mlp,) = [each for name, each in model.named_modules() if name.endswith("layers.0.mlp.down_proj")]
        kept = mlp.weight.clone()
        mlp.weight.zero_()
        assert attribute(model, batch, methods=[REMOVAL]).loss - found.loss == pytest.approx(
            found.layers[REMOVAL][1], abs=1e-6
        )
        mlp.weight.copy_(kept)
    for method in (GRADIENT, ABLATION):
        assert np.isfinite(found.edges[method][found.layout.triangle()]).all()
    assert np.nansum(found.final_share) == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        short = model(input_ids=tokens()[1:, :5], labels=tokens()[1:, :5]).loss
        long = model(input_ids=tokens()[:1], labels=tokens()[:1]).loss
    assert found.loss == pytest.approx(((short + long) / 2).item(), rel=1e-4)  # padding does not count


def test_a_baseline_whose_states_are_no_sums_has_layers_only(trained):
    model = lively_decoder(blocks=2, **RESIDUALS["deepnorm"])
    found = attribute(model, tokens(), methods=list(METHODS), steps=2, samples=1)
    assert not found.edges and set(found.layers) == set(METHODS) - {ABLATION}
    assert "is not the weighted sum of the sources before it" in found.about.notes[0]
    assert np.isnan(found.weight).all() and np.isnan(found.final_share).all()
    with pytest.raises(probes.RunError, match="Its layers can: ask for removal"):
        attribute(model, tokens(), methods=[ABLATION])


class Deaf(torch.nn.Module):
    """A layer whose output nobody hears."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        return 0 * self.inner(*given)


@pytest.mark.parametrize("kind", ["prenorm", "full"])
def test_a_layer_that_adds_nothing_is_needed_by_nobody(kind):
    model = lively_decoder(blocks=2, **RESIDUALS[kind])
    model.blocks[0].mlp = Deaf(model.blocks[0].mlp)
    found = attribute(model, tokens(), methods=list(METHODS), steps=2, samples=2)
    for method, values in found.layers.items():
        assert values[1] == pytest.approx(0, abs=1e-12), method
        assert np.abs(values[[0, 2, 3]]).min() > 1e-7, method
    for method, values in found.edges.items():
        assert values[2:, 2] == pytest.approx(0, abs=1e-12), method


def test_layers_sum_to_the_whole_by_every_method_that_promises_it():
    model = lively_decoder(blocks=2, **RESIDUALS["prenorm"])
    found = attribute(model, tokens(), methods=["integrated", "shapley"], steps=50, samples=2)
    gone = attribute(_without_layers(model), tokens(), methods=[GRADIENT])
    whole = gone.loss - found.loss
    assert found.layers["shapley"].sum() == pytest.approx(whole, rel=1e-9)
    assert found.layers["integrated"].sum() == pytest.approx(whole, rel=0.05)


def _without_layers(model):
    import copy

    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attention, block.mlp = Deaf(block.attention), Deaf(block.mlp)
    return twin


# What cannot be


def test_bad_input_is_one_sentence_before_any_work(run, trained):
    other = checkpoints(trained / "prenorm")[0]
    (run.parent / "short.txt").write_bytes(b"short")
    np.save(run.parent / "wide.npy", np.full((4, 32), 300))
    np.save(run.parent / "real.npy", np.ones((4, 32)))
    (run.parent / "junk.pt").write_bytes(b"junk")
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
        (["--memory", "1MB"], "Too little memory"),
        (["--memory", "much"], "is no size"),
        (["--methods", "integrated", "--mass", "shared"], 'need mass="kept"'),
        (["--model", "nowhere:build"], "There is no module 'nowhere'"),
        (["--model", "tests.probes.test_attributed:wider"], "is not the one that full was recorded of"),
    ):
        code, told = asked(run, *given)
        assert code and wanted in told and told.count("\n") <= 4, (given, told)
    assert not (run / attributed.FOLDER).exists()
    assert "There is no run at" in said(run.parent / "nothing")[1]


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
    code, told = said(run, "--model", "tests.probes.test_attributed:own", "--methods", "removal", "--what-if")
    assert code == 0, told
    (found,) = probes.open_run(run).attributions()
    assert found.about.data == "batch of tests.probes.test_attributed:own" and found.about.sequences == 2


def own():
    from attnres import Decoder

    shape = {"width": 16, "blocks": 2, "heads": 2, "kv_heads": 1, "context": 16}
    return Decoder(DecoderConfig(residual="full", **shape)), torch.randint(256, (4, 12))


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
            ({}, "[" * 100_000),
            ({}, ""),
        )
    ):
        name = f"{5:012d}-{number:012x}.safetensors"
        write_shard(folder / name, tensors, {"format": "2", "step": "5", "about": told})
    write_shard(folder / f"{6:012d}-{1:012x}.safetensors", {}, {"format": "2", "step": "5", "about": about})
    opened = probes.open_run(run)
    assert opened.attributions() == [] and len(opened.attribution_problems) == 8
    assert len(checking.check(run).defects) == 8


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
