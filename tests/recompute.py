"""Recompute a recorded run's numbers from the model itself: `python -m tests.recompute RUN [STEP]`.

Trains the same model again to STEP without any probe, then evaluates the float64 definition with plain autograd on the
same batch, and compares with what the run says.
"""

import copy
import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import probes
from attnres import Corpus, DecoderConfig, Training, TrainingConfig
from tests.attnres.models import defined_pass

# float32 training is repeated, but the number of threads may change its last bits.
TOLERANCE = 1e-3


def main(path: str, step: str = "0") -> bool:
    """Print the comparison; whether all agree."""
    run, good = probes.open_run(path), True
    for name, difference in compare(run, int(step)).items():
        good &= difference <= TOLERANCE
        verdict = "ok" if difference <= TOLERANCE else "DIFFERS"
        print(f"{name:24} largest relative difference {difference:.1e}  {verdict}")
    return good


def compare(run: probes.Run, step: int) -> dict[str, float]:
    """Largest relative difference of each metric at `step` between the run and the recomputation."""
    differences = {}
    for name, true in recomputed(run, step).items():
        shown = run[name][list(run.steps(name)).index(step)]
        if shown.ndim == 2:
            assert np.array_equal(np.isnan(shown), ~run.layout.triangle()), f"{name} has holes"
            shown = run.layout.pack(shown)
        assert np.array_equal(np.isnan(shown), np.isnan(true)), (
            f"{name} is blank where it should not be, or not blank"
        )
        differences[name] = float(np.nanmax(np.abs(shown - true) / np.maximum(np.abs(true), 1e-9)))
    return differences


def recomputed(run: probes.Run, step: int) -> dict[str, np.ndarray]:
    """The metrics at `step`, from the definition and plain autograd."""
    training = retrained(run, step)
    config = training.config
    batch = training.corpus.train_batch(step, config.batch, config.context, config.seed)
    return shown_numbers(training.model, *batch)


def retrained(run: probes.Run, step: int) -> Training:
    """The run's model after `step` steps, trained again without probes."""
    fields = DecoderConfig.__dataclass_fields__
    decoder = DecoderConfig(**{name: value for name, value in run.config.items() if name in fields})
    config = TrainingConfig(**run.config["training"])
    corpus = Corpus.standard_library()
    assert corpus.describe() == run.config["corpus"], "the run learned another corpus"
    training = Training(decoder, config, corpus)
    for _ in range(step):
        training.step()
    return training


def shown_numbers(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    model = copy.deepcopy(model).double()
    model.zero_grad()
    embedding = model.embedding(inputs)
    depth = defined_pass(model, embedding)
    outputs = [embedding, *depth.outputs]
    for output in outputs:
        output.retain_grad()
    logits = model.head(model.final_norm(depth.final_state))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    layers = [
        [getattr(b, part), getattr(b, f"{part}_norm")] for b in model.blocks for part in ("attention", "mlp")
    ]
    reads = getattr(model.residual, "reads", [])
    for modules, read in zip(layers, reads, strict=False):
        modules.append(read)
    numbers = {
        "loss": loss,
        "hidden_rms": torch.stack([rms(h) for h in [*depth.states, depth.final_state]]),
        "output_rms": torch.stack([rms(v) for v in outputs]),
        "output_grad_rms": torch.stack([rms(v.grad) for v in outputs]),
        "param_grad_norm": torch.stack(
            [l2(p.grad for m in modules for p in m.parameters()) for modules in layers]
        ),
        "grad_norm": l2(p.grad for p in model.parameters()),
    }
    if reads:
        numbers["depth_weight"] = torch.cat([w.flatten(1).mean(1) for w in depth.weights])
        entropy = [torch.special.entr(w).sum(0).mean() / np.log(max(len(w), 2)) for w in depth.weights]
        numbers["query_norm"] = torch.stack([(read.gain * read.query).norm() for read in reads])
        # The first read has one source, so its entropy is blank.
        numbers["depth_entropy"] = torch.stack([torch.tensor(torch.nan), *entropy[1:]])
    return {name: value.detach().numpy() for name, value in numbers.items()}


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def l2(tensors) -> Tensor:
    return sum(x.square().sum() for x in tensors).sqrt()


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    try:
        sys.exit(0 if main(*sys.argv[1:]) else 1)
    except probes.RunError as problem:
        sys.exit(str(problem))
