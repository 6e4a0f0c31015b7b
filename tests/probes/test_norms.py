"""Norms as they are understood: their backward is autograd's, and what is no norm is not taken for one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from probes.norms import understood


class Gemma(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(12)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), (12,), eps=self.eps).to(x.dtype) * (1 + self.weight)


NORMS = {
    "rms": lambda eps: nn.RMSNorm(12, eps=eps),
    "rms, no gain": lambda eps: nn.RMSNorm(12, eps=eps, elementwise_affine=False),
    "layer": lambda eps: nn.LayerNorm(12, eps=eps),
    "layer, no gain": lambda eps: nn.LayerNorm(12, eps=eps, elementwise_affine=False),
    "one plus": Gemma,
}


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("name", NORMS)
def test_the_backward_of_a_norm_is_autograds(name, eps):
    module = NORMS[name](eps)
    norm = understood(module)
    for parameter in module.parameters():  # trained since
        nn.init.normal_(parameter)
    for scale in (1e-3, 1, 100):
        x = (scale * torch.randn(5, 12)).requires_grad_()
        gradient = torch.randn(5, 12)
        (expected,) = torch.autograd.grad(module(x), x, gradient)
        error = (norm.backward(x.detach(), gradient) - expected).norm() / expected.norm()
        assert error < (1e-4 if scale == 1e-3 else 1e-5), scale


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(),
        nn.GroupNorm(2, 8),
        nn.LayerNorm([4, 8]),
    ],
)
def test_what_is_no_norm_of_channels_is_not_taken_for_one(module):
    state = torch.get_rng_state()
    assert understood(module) is None
    assert torch.equal(torch.get_rng_state(), state)
