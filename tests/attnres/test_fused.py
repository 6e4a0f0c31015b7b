"""Fused kernels of other packages: how one is chosen, and that each adapter is the definition.

No GPU is needed. Liger's own kernels run in Triton's interpreter, on the CPU; FLA's do not, so its adapter meets FLA's
reference, which has the kernel's signature. Where a package or Triton is not installed its test says so.
"""

import importlib.util
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import attnres
from attnres import definition, fused
from tests.attnres.models import ATTNRES, RESIDUALS, lively_decoder, loss_of, tokens

CPU = torch.device("cpu")


def right(sources, query, gain, eps):
    mix, weight = definition.depth_attention(query * gain, sources, eps)
    return mix, weight.detach()


def wrong(sources, query, gain, eps):
    mix, weight = right(sources, query, gain, eps)
    return mix + 1e-3 * sources[0], weight


def not_a_number(sources, query, gain, eps):
    mix, weight = right(sources, query, gain, eps)
    return mix, weight * float("nan")


def raising():
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def packages(monkeypatch):
    """Sets which packages are installed, and lets them read on the CPU."""
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))

    def install(**loaders):
        monkeypatch.setattr(fused, "PACKAGES", loaders)
        present = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name if name in loaders else present(name)
        )
        fused._checked.cache_clear()

    yield install
    fused._checked.cache_clear()


def counting(calls):
    def read(*given):
        calls.append(len(given[0]))
        return right(*given)

    return lambda: read


def test_without_cuda_nothing_is_fused():
    assert fused.fused_read([torch.ones(1, 2, 4)]) is None


def test_the_first_package_that_is_right_is_taken(packages):
    packages(fla=lambda: right, liger_kernel=lambda: right)
    sources = [torch.ones(1, 2, 4)] * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused.fused_read(sources) is right


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (
            lambda: wrong,
            "fla is not used for depth reads: on cpu its kernel differs from the definition by 2.2e-03",
        ),
        (lambda: not_a_number, "differs from the definition by nan"),
        (raising, "RuntimeError: no kernel image is available"),
    ],
)
def test_one_that_is_wrong_or_fails_is_left_alone_with_one_warning(packages, loader, says):
    packages(fla=loader, liger_kernel=lambda: right)
    sources = [torch.ones(1, 2, 4)]
    with pytest.warns(UserWarning, match=says) as heard:
        reads = [fused.fused_read(sources) for _ in range(3)]
    assert reads == [right] * 3
    assert len(heard) == 1


def test_what_a_kernel_cannot_take_is_read_without_it(packages):
    packages(liger_kernel=lambda: right)
    one = torch.ones(1, 2, 4)
    assert fused.fused_read([one] * 32) is right
    assert fused.fused_read([one] * 33) is None
    assert fused.fused_read([one], most=33) is None
    assert fused.fused_read([one.double()]) is None
    assert fused.fused_read([one, one.bfloat16()]) is None
    meta = torch.ones(1, 2, 4, device="meta")
    assert fused.fused_read([meta]) is None


def test_ligers_indices_do_not_overflow(packages):
    packages(liger_kernel=lambda: right)
    large = torch.ones(1).expand(2**15, 2**13, 8)
    assert fused.fused_read([large] * 1) is None
    assert fused.fused_read([large[:, 1:]] * 1) is right
    assert fused.fused_read([large[: 2**14]] * 2) is None


def test_flas_rows_are_aligned(packages):
    packages(fla=lambda: right)
    assert fused.fused_read([torch.ones(1, 2, 12)]) is right
    assert fused.fused_read([torch.ones(1, 2, 12).bfloat16()]) is None


def test_the_trial_does_not_mind_another_default_device_or_dtype():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert fused.largest_difference(right, CPU) <= fused.TOLERANCE
    finally:
        torch.set_default_dtype(default)


def test_the_trial_leaves_random_numbers_and_modes_alone(packages):
    packages(fla=lambda: right)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert fused.fused_read([torch.ones(1, 2, 4)]) is right
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ATTNRES)
def test_a_decoder_reads_through_it_by_itself(packages, kind):
    calls = []
    packages(fla=counting(calls))
    model, inputs = lively_decoder(**RESIDUALS[kind]).float(), tokens()
    weights = []
    for read in model.residual.reads:
        read.register_forward_hook(lambda m, args, out: weights.append(out[1].detach()))
    results = {}
    for schedule in ("auto", "no_stack"):
        calls.clear()
        weights.clear()
        model.residual.schedule = schedule
        loss = loss_of(model(inputs), inputs)
        results[schedule] = loss, torch.autograd.grad(loss, list(model.parameters())), [*weights]
        # The trial reads three sources, once.
        expected = [read.depth_sources for read in model.residual.reads] if schedule == "auto" else []
        assert calls[-len(expected) :] == expected if expected else not calls
    torch.testing.assert_close(results["auto"], results["no_stack"], rtol=2e-3, atol=2e-4)


def test_a_converted_model_reads_through_it_by_itself(packages):
    pytest.importorskip("transformers")
    from tests.attnres.families import FAMILIES, logits_of

    family = FAMILIES["Llama"]
    model, inputs = attnres.convert(family.seeded(), "block", 3), family.inputs()
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
    plain = logits_of(model(**inputs))
    calls = []
    packages(fla=counting(calls))
    torch.testing.assert_close(logits_of(model(**inputs)), plain)
    assert calls[1:] == [read.depth_sources for read in model.attnres.reads]


def test_the_functional_form_reads_through_it(packages):
    calls = []
    sources = [torch.randn(2, 3, 4) for _ in range(5)]
    proj, norm = nn.Linear(4, 1, bias=False), nn.RMSNorm(4, eps=1e-3)
    plain = attnres.full_attn_res(sources, proj, norm)
    packages(fla=counting(calls))
    torch.testing.assert_close(attnres.full_attn_res(sources, proj, norm), plain)
    assert calls == [3, 5]


def test_a_fused_schedule_without_a_kernel_is_refused():
    model = lively_decoder(residual="full")
    model.residual.schedule = "fused"
    with pytest.raises(ValueError, match='schedule "fused" needs tensors on CUDA'):
        model(tokens())


def test_a_compiled_model_does_without(packages):
    packages(fla=lambda: right)
    torch._dynamo.reset()
    model, inputs = lively_decoder(residual="full").float(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-3, atol=1e-4)


def installed(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_fla_is_called_as_its_reference_is(monkeypatch):
    installed("triton", "einops", "fla")
    import fla.ops.attnres as package

    kernel, reference = (
        inspect.signature(f).parameters for f in (package.fused_attnres, package.naive_attnres)
    )
    assert list(kernel)[: len(reference)] == list(reference)
    monkeypatch.setattr(package, "fused_attnres", package.naive_attnres)
    assert fused.largest_difference(fused.fla(), CPU) <= fused.TOLERANCE


INTERPRETED = """
import torch
from attnres import fused
print(fused.largest_difference(fused.liger(), torch.device("cpu")))
"""


def test_ligers_kernels_in_tritons_interpreter_are_the_definition(monkeypatch):
    installed("triton", "liger_kernel")
    # Triton takes the interpreter when it is imported, so in a process of its own.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) <= fused.TOLERANCE
