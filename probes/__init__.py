"""depthscope's probes: record what depth does in a training run, and read it back.

`record` needs torch; `open_run` and `list_runs` do not, and importing this package does not import torch.
"""

import importlib

from probes.manifest import RunError
from probes.run import Run, list_runs, open_run
from probes.schedule import log_spaced

__all__ = [
    "Run",
    "RunError",
    "attach",
    "attribute",
    "bench",
    "describe",
    "list_runs",
    "log_spaced",
    "mark",
    "open_run",
    "record",
]

# Imported when first asked for, so that a viewer without torch can read runs.
_LAZY = {
    "attach": "attaching",
    "attribute": "attribution",
    "record": "recording",
    "Recorder": "recorder",
    "bench": "benching",
    "describe": "describing",
    "mark": "marks",
}


def __getattr__(name: str):
    if name in _LAZY:
        try:
            module = importlib.import_module(f"probes.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"probes.{name} needs {error.name}, and only the viewer is installed: "
                'pip install "depthscope[probes]"'
            ) from error
        return getattr(module, name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
