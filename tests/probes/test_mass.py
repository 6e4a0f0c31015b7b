"""What becomes of the weight of a source that is removed: it is kept, or shared out among the others."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from probes.attributed import ABLATION, GRADIENT, REMOVAL, SHAPLEY
from probes.attribution import attribute
from tests.attnres.models import RESIDUALS, lively_decoder, tokens


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).item()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "block of 2"])
def test_of_a_layer_that_is_gone_others_take_over_the_weight(kind):
    """Layer 2, the first MLP: in Full a source of its own, in Block half of a depth block."""
    model = lively_decoder(blocks=2, **RESIDUALS[kind])
    found = attribute(model, tokens(), methods=[REMOVAL], mass="shared")
    kept = attribute(model, tokens(), methods=[REMOVAL])
    model.blocks[0].mlp.output.weight.zero_()

    def without(module, args, output):
        sources, weight = args[0], output[1]
        if len(weight) < 3:
            return None  # layer 2 is no source yet
        rest = [s for s in range(len(weight)) if s != 2]
        whole = sum(weight[s] for s in rest)
        mix = sum((weight[s] / whole).unsqueeze(-1) * sources[s] for s in rest)
        return mix, weight

    if kind == "full":
        for read in model.residual.reads:
            read.register_forward_hook(without)
    base = found.loss
    assert found.layers[REMOVAL][1] == pytest.approx(loss_of(model(tokens())) - base, rel=1e-9)
    same = found.layers[REMOVAL][1] == pytest.approx(kept.layers[REMOVAL][1], rel=1e-9)
    assert same == (kind != "full")  # the other layer of the depth block keeps its source, and its weight


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "block of 2"])
def test_without_any_layer_the_embedding_has_all_weight(kind):
    model = lively_decoder(blocks=2, **RESIDUALS[kind])
    found = attribute(model, tokens(), methods=[SHAPLEY], samples=2, mass="shared")
    alone = loss_of(model.head(model.final_norm(model.embedding(tokens()))))
    assert found.layers[SHAPLEY].sum() == pytest.approx(alone - found.loss, rel=1e-9)


def test_a_layers_slope_is_that_of_its_edges():
    """In Full a layer is one source, and its gate is that of all edges from it."""
    model = lively_decoder(blocks=2, **RESIDUALS["full"])
    found = attribute(model, tokens(), methods=[GRADIENT], mass="shared")
    # The gate of an output also scales what is read, as that of an edge does: the two are one slope.
    np.testing.assert_allclose(
        np.nansum(found.edges[GRADIENT][:, 1:], 0), found.layers[GRADIENT], rtol=1e-3, atol=1e-6
    )


def test_the_weights_of_a_plain_sum_are_nobodys():
    model = lively_decoder(blocks=2, **RESIDUALS["prenorm"])
    for method in (REMOVAL, ABLATION):
        kept, shared = (
            attribute(model, tokens(), methods=[method], mass=mass) for mass in ("kept", "shared")
        )
        name = "layers" if method == REMOVAL else "edges"
        np.testing.assert_array_equal(getattr(kept, name)[method], getattr(shared, name)[method])
