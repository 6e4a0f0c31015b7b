"""Where a run comes from: the model's own configuration, and the versions and the device that recorded it."""

import dataclasses
import json
import os
import platform
from pathlib import Path

import torch
from torch import nn

from probes.version import version


def model_config(root: nn.Module) -> dict:
    """The model's own configuration, where it carries one; what JSON has no value for is written as text."""
    config = getattr(root, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, dict):
        return {}
    return json.loads(json.dumps(config, default=str, skipkeys=True), parse_constant=str)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor() -> str:
    """The name of this machine's processor and how many cores it shows."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions(root: nn.Module) -> dict:
    """What recorded: software, device and type of the model, and its size."""
    parameter = next(root.parameters())
    return {
        "depthscope": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(parameter.device),
        "processor": processor(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in root.parameters()),
    }
