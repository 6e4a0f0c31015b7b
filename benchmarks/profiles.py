"""Where the time of one call goes, kernel by kernel: what stands beside a figure that is missed."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 12
LONGEST = 90  # characters of a kernel's name


def profiled(call: Callable[[], object], device: str) -> list[dict]:
    """The kernels of one call that take most, and what all others take: name, calls, milliseconds.

    On CUDA of the device's time, elsewhere of the host's. The call has run before, so that nothing is compiled.
    """
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        call()
        if cuda:
            torch.cuda.synchronize()
    # A call stands there twice, with its kernels' time and as those kernels; what is annotated, a third time.
    events = [event for event in seen.key_averages() if not event.is_user_annotation]
    if cuda:
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(event.key[:LONGEST], event.count, getattr(event, spent)) for event in events]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    rest = rows[MOST:]
    if rest:
        others = sum(row[1] for row in rest), sum(row[2] for row in rest)
        rows = [*rows[:MOST], (f"{len(rest)} others", *others)]
    return [{"name": name, "calls": calls, "ms": micro / 1e3} for name, calls, micro in rows]


def printed(profiles: dict[str, list[dict]]) -> str:
    """Profiles by contender, in Markdown."""
    parts = []
    for contender, rows in profiles.items():
        calls, total = sum(row["calls"] for row in rows), sum(row["ms"] for row in rows)
        lines = [
            f"{contender}: {total:.1f} ms in {calls:,} calls",
            "",
            "| ms | calls | kernel |",
            "|---|---|---|",
        ]
        # A vertical line would end the cell.
        lines += [f"| {row['ms']:.2f} | {row['calls']} | `{row['name'].replace('|', '/')}` |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
