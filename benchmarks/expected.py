"""What a sample run should take on a GPU, before anybody has one: `python -m benchmarks.expected`.

One training step of each plan on tensors without data: its arithmetic, its calls, the bytes that go in and out of them.
The device needs the arithmetic at RATE and then the bytes at BANDWIDTH, the host CALL for every call; the slower one sets
the pace. Steps that are recorded, validation and the beginning come on top (SPARE, BEGINNING). Everything is counted in
float32, so that autocast moves less, and its casts as one more call for each matrix product. Attention is taken for one
kernel that reads query, key and value; its own arithmetic, a fifteenth of the rest here, is left out.
"""

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

try:
    from attnres import Decoder, DecoderConfig
    from sample_runs.plans import Plan, plans
except ImportError as error:
    raise SystemExit(
        f"Run this from the repository's root as `python -m benchmarks.expected` ({error})."
    ) from error

RATE = 350e12
"""FLOP/s that mid-sized 16-bit products reach on an H200, under half of what large ones do."""
BANDWIDTH = 3.5e12
"""B/s, of 4.8e12 by the data sheet."""
CALL = 8e-6
"""Seconds that the host takes to have one call issued, with autograd's part."""
SPARE = 1.4
BEGINNING = 20.0
"""Seconds until a process has imported torch, made its model and found its layers."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@dataclass(frozen=True)
class Expected:
    """Of one step: FLOP, calls, bytes; of all: seconds."""

    parameters: int
    flop: float
    calls: int
    bytes: float
    steps: int

    @property
    def step(self) -> float:
        return max(self.flop / RATE + self.bytes / BANDWIDTH, self.calls * CALL)

    @property
    def seconds(self) -> float:
        return BEGINNING + SPARE * self.step * self.steps


class _Counting(TorchDispatchMode):
    """Calls that move data, and the bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.__name__ and "detach" not in function.__name__:
            self.calls += 2 if function.__name__.split(".")[0] in PRODUCTS else 1
            every = torch.utils._pytree.tree_leaves((args, kwargs, found))
            self.bytes += sum(x.nbytes for x in every if isinstance(x, torch.Tensor))
        return found


def _flash(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
    """What attention moves where no score is written: it has the shape of the query."""
    groups = query.shape[1] // key.shape[1]
    return query + (key + value).repeat_interleave(groups, 1)


def expected(plan: Plan) -> Expected:
    """Counted on one step."""
    training = plan.training
    with torch.device("meta"):
        made = plan.model()
        model = Decoder(made) if isinstance(made, DecoderConfig) else made.to("meta")
        tokens = torch.zeros(training.batch, training.context, dtype=torch.long)
    counting = _Counting()
    attention = mock.patch.object(F, "scaled_dot_product_attention", _flash)
    with attention, FlopCounterMode(display=False) as flop, counting:
        output = model(tokens)
        logits = getattr(output, "logits", output)
        F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
    parameters = sum(p.numel() for p in model.parameters())
    # AdamW reads parameter, gradient and both moments and writes three of them; clipping reads and writes the gradient.
    moved = counting.bytes + 10 * 4 * parameters
    steps = training.steps if plan.kill_at is None else plan.kill_at
    return Expected(parameters, flop.get_total_flops(), counting.calls, moved, steps)


def main() -> None:
    print("| run | parameters | steps | TFLOP a step | calls | GB moved | ms a step | seconds in all |")
    print("|---|---|---|---|---|---|---|---|")
    for plan in plans("cuda"):
        if plan.name.startswith("kimi"):
            continue  # its loops ask for values, and tensors without data have none
        e = expected(plan)
        print(
            f"| {plan.name} | {e.parameters / 1e6:.0f} M | {e.steps} | {e.flop / 1e12:.2f} | {e.calls:,} | "
            f"{e.bytes / 1e9:.1f} | {1e3 * e.step:.0f} | {e.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
