"""The real Triton kernels of FLA and Liger, run by Triton's interpreter on the CPU and attached to: not part of the suite.

pip install triton liger-kernel fla-core einops
TRITON_INTERPRET=1 python -m tests.probes.kernels
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import probes
from tests.probes.foreign import Foreign
from tests.probes.models import sgd
from tests.probes.test_foreign import own_weights, step, tokens


class Fused(Foreign):
    """Reads by a kernel; `normed`: the norm after a read is fused with it."""

    def __init__(self, normed: bool, **sizes):
        super().__init__(**sizes)
        self.normed = normed
        for read in self.reads:
            read.out = nn.Parameter(torch.rand(read.width) + 0.5)

    def read(self, number, done, partial):
        read, sources = self.reads[number], [*done, *([] if partial is None else [partial])]
        if read.asked:
            keys = F.rms_norm(torch.stack(sources), (read.width,), read.gain, 1e-6)
            read.kept((keys @ read.query).softmax(0))
        return self.kernel(read, sources)


class Liger(Fused):
    def kernel(self, read, sources):
        from liger_kernel.ops.attn_res import LigerAttnResFunction

        return LigerAttnResFunction.apply(torch.stack(sources), read.query, read.gain, 1e-6)


class FLA(Fused):
    def kernel(self, read, sources):
        from fla.ops.attnres.fused import fused_attnres

        return fused_attnres(read.query, sources, read.gain, read.out if self.normed else None)


def interpret_fla(folder: Path) -> None:
    """FLA's module with what the interpreter lacks taken out: there counters are plain integers, tensors are on the CPU
    and nothing can be timed. The kernels' arithmetic is as it was."""
    name = "fla.ops.attnres.fused"
    text = Path(importlib.util.find_spec(name).origin).read_text()
    text = text.replace("(i_l * BL).to(tl.int64)", "i_l * BL").replace(
        "i_n.to(tl.int64) + tl.arange", "i_n + tl.arange"
    )
    text = text.replace(".is_cuda", ".is_cpu")
    path = folder / "fla_fused.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for value in vars(module).values():
        if hasattr(value, "configs"):
            value.configs = value.configs[:1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        interpret_fla(Path(folder))
        for kind, normed, size in (
            (Liger, False, None),
            (Liger, False, 2),
            (FLA, False, None),
            (FLA, False, 2),
            (FLA, True, None),
            (FLA, True, 2),
        ):
            model, batch = kind(normed, size=size, width=16), tokens(2, 5)
            own = own_weights(model, batch)
            path = Path(folder) / f"{kind.__name__}-{normed}-{size}"
            optimizer = sgd(model)
            with probes.record(model, path, optimizer=optimizer, every=1, matrices_every=1, strict=True):
                step(model, optimizer, batch)
            run = probes.open_run(path)
            means = [weight.reshape(len(weight), -1).mean(1) for weight in own]
            assert [read.sources for read in run.reads] == [len(mean) for mean in means]
            found = run["depth_weight"][0]
            apart = max(np.abs(found[row][: len(mean)] - mean).max() for row, mean in enumerate(means))
            which = "Full" if size is None else f"Block of {size}"
            after = ", norm fused" if normed else ""
            print(f"{kind.__name__} {which}{after}: {len(means)} reads, mean weights off by {apart:.0e}")
            assert apart < 1e-4


if __name__ == "__main__":
    main()
