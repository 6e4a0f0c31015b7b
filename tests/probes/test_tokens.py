"""Token snapshots: the weights of the same tokens throughout training, which goes on as if nobody looked."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnres
import probes
from probes import marks
from probes.checking import check, repair
from probes.manifest import RANK_FOLDER
from tests.probes.models import batches, decoder, hooks_on, loss_of, sgd, train

ALL = {"every": 1, "matrices_every": 2, "strict": True}
FLOAT16 = {"rtol": 1e-3, "atol": 1e-4}


def weights_of(model, *args, **kwargs) -> np.ndarray:
    """[sequence, token, read, source] of a forward, from what the model's own reads return."""
    twin = copy.deepcopy(model).eval()
    reads = [module for module in twin.modules() if isinstance(module, attnres.DepthAttention)]
    seen = []
    for read in reads:
        read.register_forward_hook(lambda read, args, output: seen.append(output[1]))
    with torch.no_grad():
        twin(*args, **kwargs)
    dense = torch.full((*seen[0].shape[1:], len(reads), max(map(len, seen))), torch.nan)
    for row, weight in enumerate(seen):
        dense[:, :, row, : len(weight)] = weight.movedim(0, -1)
    return dense.numpy()


@pytest.mark.parametrize("kind", ["full", "block of 4, ragged"])
def test_the_weights_are_those_of_the_model(kind, tmp_path):
    model = decoder(kind)
    optimizer, own = sgd(model, 0.5), {}
    (followed,) = batches(0, [(3, 8)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=[range(2), 3], **ALL):
        for step in range(5):
            own[step] = weights_of(model, followed[:2])
            (tokens,) = batches(step, [(3, 8)])
            loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    run = probes.open_run(tmp_path / "run")
    assert run.token_steps.tolist() == [0, 1, 3] and run.tokens().step == 3
    for step in run.token_steps:
        its = run.tokens(step)
        assert its.weight.dtype == np.float32 and its.texts is None
        np.testing.assert_array_equal(its.ids, followed[:2])
        np.testing.assert_allclose(its.weight, own[step], **FLOAT16)
    assert np.abs(run.tokens(3).weight - run.tokens(0).weight)[..., 1:, :2].max() > 0.01


def test_their_mean_is_what_the_run_records(tmp_path):
    model = decoder("full")
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=2, **ALL):
        train(model, optimizer, 1)  # of two sequences
    run = probes.open_run(tmp_path / "run")
    np.testing.assert_allclose(run.tokens(0).weight.mean((0, 1)), run["depth_weight"][0], **FLOAT16)


# Training goes on as if nobody looked


class Restless(nn.Module):
    """A model with dropout, and with buffers that every forward changes: in place, by another tensor, and in training."""

    def __init__(self):
        super().__init__()
        self.model, self.dropout, self.norm = decoder("full"), nn.Dropout(0.2), nn.BatchNorm1d(17)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, batch):
        self.calls.add_(1)
        self.replaced = self.replaced + torch.rand(())
        x = self.dropout(self.model(batch["tokens"]))
        return self.norm(x.flatten(0, 1)).view_as(x) * (1 + 1e-3 * self.calls)


def trained(path=None, **options):
    torch.manual_seed(0)
    model = Restless()
    model.model.final_norm.eval()  # as somebody might have it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = probes.record(model, path, optimizer=optimizer, **options) if path else None
    for step in range(5):
        for tokens in batches(step):  # micro-batches, of a dict
            loss_of(model({"tokens": tokens}), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    if recorder:
        recorder.close()
    return model


def test_training_is_bit_identical(tmp_path):
    plain, state = trained(), torch.get_rng_state()
    watched = trained(tmp_path / "run", tokens_every=1, **ALL)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, mine), other in zip(watched.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    assert [m.training for m in watched.modules()] == [m.training for m in plain.modules()]
    assert hooks_on(watched) == hooks_on(plain) and not marks._listening
    run = probes.open_run(tmp_path / "run")
    assert run.token_steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(run.tokens(4).ids, batches(0)[0][:2])


def test_who_does_not_ask_has_no_hook_for_it(tmp_path):
    hooks = []
    for name, options in (("without", {}), ("with", {"tokens_every": 10})):
        model = decoder("full", blocks=1)
        with probes.record(model, tmp_path / name, optimizer=sgd(model), **options):
            hooks.append(hooks_on(model))
    assert hooks[1] == hooks[0] + 4  # the model and its three reads
    assert not list((tmp_path / "without" / RANK_FOLDER).glob("tokens*"))


def compiled_run(path, **options):
    """Parameters after three compiled steps, and the number of graphs."""
    torch._dynamo.reset()
    model = decoder("full", blocks=1)
    optimizer, counter = sgd(model, 0.1), CompileCounterWithBackend("aot_eager")
    one_graph = {"every": 1, "matrices_every": 1, "strict": True}
    with probes.record(model, path, optimizer=optimizer, **one_graph, **options):
        train(torch.compile(model, fullgraph=True, backend=counter), optimizer, 3)
    torch._dynamo.reset()
    return list(model.parameters()), counter.frame_count


def test_a_compiled_model_is_followed_as_an_eager_one(tmp_path):
    _, graphs = compiled_run(tmp_path / "compiled", tokens_every=2)
    assert graphs == 1
    model = decoder("full", blocks=1)
    optimizer = sgd(model, 0.1)
    with probes.record(model, tmp_path / "eager", optimizer=optimizer, tokens_every=2, **ALL):
        train(model, optimizer, 3)
    run, eager = probes.open_run(tmp_path / "compiled"), probes.open_run(tmp_path / "eager")
    assert run.token_steps.tolist() == eager.token_steps.tolist() == [0, 2]
    for step in run.token_steps:
        np.testing.assert_array_equal(run.tokens(step).ids, eager.tokens(step).ids)
        np.testing.assert_allclose(run.tokens(step).weight, eager.tokens(step).weight, **FLOAT16)


@pytest.mark.long
def test_compiled_training_is_bit_identical(tmp_path):
    plain, watched = compiled_run(tmp_path / "plain"), compiled_run(tmp_path / "run", tokens_every=1)
    assert watched[1] == plain[1]  # no further graph
    assert all(torch.equal(mine, other) for mine, other in zip(watched[0], plain[0], strict=True))


# What models are called with


def test_a_batch_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = attnres.convert(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **size)), "full"
    )
    torch.nn.init.normal_(
        model.get_parameter(next(n for n, _ in model.named_parameters() if n.endswith("query")))
    )
    tokens = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    batch = {"attention_mask": torch.ones_like(tokens), "input_ids": tokens, "labels": tokens}
    batch["attention_mask"][1, 5:] = 0
    optimizer = sgd(model)
    own = weights_of(model, input_ids=tokens[:2], attention_mask=batch["attention_mask"][:2])
    with probes.record(
        model, tmp_path / "run", optimizer=optimizer, tokens_every=5, decode=lambda ids: f"<{ids[0]}>", **ALL
    ):
        model(**batch).loss.backward()
        optimizer.step()
    its = probes.open_run(tmp_path / "run").tokens(0)
    np.testing.assert_array_equal(its.ids, tokens[:2])
    assert its.texts == [[f"<{token}>" for token in row] for row in tokens[:2].tolist()]
    own[1, 5:] = np.nan  # padding
    np.testing.assert_allclose(its.weight, own, **FLOAT16)


def test_as_many_as_there_are(tmp_path):
    model = decoder("full", blocks=1, context=200)
    optimizer = sgd(model)
    (tokens,) = batches(0, [(1, 150)])
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=5, **ALL):
        loss_of(model(tokens), tokens).backward()
        optimizer.step()
    its = probes.open_run(tmp_path / "run").tokens()
    assert its.weight.shape == (1, 128, 3, 3) and its.ids.shape == (1, 128)
    np.testing.assert_allclose(np.nansum(its.weight, -1), 1, atol=1e-3)


def test_a_long_batch_that_begins_with_padding(tmp_path):
    """As for generation. Of each sequence the tokens that count are followed, not the padding before them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = attnres.convert(transformers.LlamaForCausalLM(config), "full")
    real = torch.tensor([20, 140])
    mask = (torch.arange(150) >= 150 - real[:, None]).long()
    tokens = torch.randint(1, 64, (2, 150)) * mask
    own = weights_of(model, input_ids=tokens, attention_mask=mask)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=1, **ALL):
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        optimizer.step()
    its = probes.open_run(tmp_path / "run").tokens(0)
    own[0, :130] = np.nan
    np.testing.assert_array_equal(its.ids, np.stack([tokens[0, 22:], tokens[1, 10:138]]))
    np.testing.assert_allclose(its.weight, np.stack([own[0, 22:], own[1, 10:138]]), **FLOAT16)


def test_a_loop_without_an_optimizer(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", tokens_every=2, **ALL) as recorder:
        for step in range(4):
            train(model, optimizer, 1, start=step)
            recorder.step()
    # Of the model that leaves the last step, too.
    assert probes.open_run(tmp_path / "run").token_steps.tolist() == [0, 2, 4]


# What goes wrong


def test_a_model_without_reads_is_refused(tmp_path):
    model = decoder("prenorm", blocks=1)
    with pytest.raises(probes.RunError, match="this Decoder has none that can be seen: leave it out"):
        probes.record(model, tmp_path / "run", optimizer=sgd(model), tokens_every=10)
    with pytest.raises(probes.RunError, match="tokens_every is 0"):
        probes.record(decoder("full"), tmp_path / "run", tokens_every=0)
    assert not (tmp_path / "run").exists()


def test_a_decode_that_fails_costs_the_texts_alone(tmp_path, caplog):
    def decode(ids):
        raise ValueError("no such token")

    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=1, decode=decode):
        train(model, optimizer, 2)
    run = probes.open_run(tmp_path / "run")
    assert run.token_steps.tolist() == [0, 1] and run.tokens().texts is None
    (said,) = [record.message for record in caplog.records]
    assert "could not record token texts" in said and "no such token" in said


def test_what_is_not_there_or_broken_is_one_sentence(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=2):
        train(model, optimizer, 3)
    run = probes.open_run(tmp_path / "run")
    with pytest.raises(KeyError, match="no token snapshot at step 1; it has: 0, 2"):
        run.tokens(1)
    (path,) = (tmp_path / "run" / RANK_FOLDER).glob("tokens-*2.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(probes.RunError, match="token snapshot of run at step 2 does not match its checksum"):
        run.tokens(2)
    found = check(tmp_path / "run")
    assert [str(defect) for defect in found.defects] == [
        f"The token snapshot of step 2 is missing: {path.name} does not match its checksum: its content changed after it "
        "was written."
    ]
    repair(found)
    assert run.token_steps.tolist() == [0] and not check(tmp_path / "run").defects


def test_a_resumed_run_hides_what_was_trained_again(tmp_path):
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=1):
        train(model, optimizer, 4)
    with torch.no_grad():
        model.residual.reads[-1].query.zero_()
    with probes.record(model, tmp_path / "run", optimizer=optimizer, tokens_every=2, resume=2):
        train(model, optimizer, 2, start=2)
    run = probes.open_run(tmp_path / "run")
    assert run.token_steps.tolist() == [0, 1, 2]
    np.testing.assert_allclose(run.tokens(2).weight[..., -1, :], 1 / 3, atol=1e-3)
