"""Converted models for tests: made with random queries, run in several ways, and compared with their twins."""

import copy

import torch

import attnres
from tests.attnres.families import FAMILIES, DiT, logits_of

RESIDUALS = {
    "full": ("full", None),
    "block of 2": ("block", 2),
    "block of 3, across transformer blocks": ("block", 3),
    "block of 4, ragged": ("block", 4),
}
EPS = 1e-6


def prepared(name, kind="block of 4, ragged", dtype=torch.float64, **changes):
    """A family, an unconverted model, the converted one with random queries, and inputs."""
    family = FAMILIES[name]
    original = family.seeded(**changes).to(dtype).train()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in family.inputs().items()}
    residual, size = RESIDUALS[kind]
    model = attnres.convert(copy.deepcopy(original), residual, size, example=inputs, eps=EPS)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
            read.gain.add_(torch.randn_like(read.gain), alpha=0.2)
    return family, original, model, inputs


def loss_of(model, inputs):
    return logits_of(model(**inputs)).square().mean()


def gradients(loss, parameters):
    """Zeros where nothing reaches a parameter: an expert that no token went to."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_same_gradients(family, original, model, inputs, loss):
    """Every gradient of the converted model at its weights, and the twin's."""
    shared = {name: p for name, p in model.named_parameters() if not name.startswith("attnres.")}
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.copy_(shared[name])
    queries = [read.gain * read.query for read in model.attnres.reads]
    defined = family.twin(original, inputs, queries, model.attnres_size, EPS).square().mean()
    tolerance = 3e-5 if family.norms_in_float32 else 1e-9
    torch.testing.assert_close(loss, defined, rtol=tolerance, atol=0)
    reads = list(model.attnres.parameters())
    ours = gradients(loss, [*shared.values(), *reads])
    theirs = gradients(defined, [*(dict(original.named_parameters())[name] for name in shared), *reads])
    names = [*shared, *(name for name, _ in model.attnres.named_parameters())]
    largest = max(gradient.norm() for gradient in theirs)
    for name, one, other in zip(names, ours, theirs, strict=True):
        difference = (one - other).norm()
        assert difference <= tolerance * other.norm() + 0.01 * tolerance * largest, f"{name}: {difference}"
    return ours


def checkpointed(model, reentrant=False):
    """The model with every transformer block under checkpointing, and no cache, which that does not go with."""
    if isinstance(model, DiT):
        model.checkpointing = {"use_reentrant": reentrant}
        return model
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    return model


def compiled(model, name, recomputes=False, backend="aot_eager"):
    torch._dynamo.reset()
    # Experts and delta attention break the graph by themselves; inside a checkpoint it breaks where ViT's calls of one
    # dropout are told apart, and at hooks on a block, which DiT's author has inside.
    broken = name in ("Kimi Linear", "DeepSeek-V3") or (name in ("ViT", "DiT") and recomputes)
    return torch.compile(model, backend=backend, fullgraph=not broken)


def checked(name, kind, change=lambda model: model):
    family, original, model, inputs = prepared(name, kind)
    model.attnres_size = RESIDUALS[kind][1] or 1
    return assert_same_gradients(family, original, model, inputs, loss_of(change(model), inputs))
