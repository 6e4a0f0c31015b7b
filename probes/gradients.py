"""Parameter norms and gradient norms by layer, measured when a backward pass ends.

That moment is after accumulation and before any clipping, in eager and in compiled training alike. With
several micro-batches each backward measures again and the last one, the accumulated gradient, stands.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.sites import Sites


class GradientNorms:
    """Calls `measure` at the end of each backward while `wanted()` is true; `finish` gives the metrics."""

    def __init__(self, sites: Sites, wanted: Callable[[], bool]):
        self._wanted = wanted
        self._queued_in = -1  # the backward pass at whose end `_measure` is due
        self._reads = sites.reads
        layers = sites.layer_parameters()
        inside = {p for group in layers for p in group}
        others = [p for p in sites.root.parameters() if p not in inside]
        self._groups = [*layers, others]
        self._parameters = [p for group in self._groups for p in group]
        device = self._parameters[0].device
        groups = [row for row, group in enumerate(self._groups) for _ in group]
        self._row = torch.tensor(groups, device=device)
        self._zero = torch.zeros((), device=device)
        self._squares: Tensor | None = None
        self._norm_squares: Tensor | None = None
        self._query_norm: Tensor | None = None
        self._handles = [
            # One parameter per group is enough to notice a backward pass; a whole model's worth of hooks is
            # not needed.
            next(p for p in group if p.requires_grad).register_post_accumulate_grad_hook(self._notice)
            for group in self._groups
            if any(p.requires_grad for p in group)
        ]

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        self._squares = self._norm_squares = self._query_norm = None

    def _notice(self, parameter: nn.Parameter) -> None:
        # By its id, not by a flag: a backward pass that raises never calls back.
        backward = torch._C._current_graph_task_id()
        if self._wanted() and backward != self._queued_in:
            self._queued_in = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._measure)

    @torch.no_grad()
    def _measure(self) -> None:
        self._squares = self._by_group([p.grad for p in self._parameters])
        self._norm_squares = self._by_group(self._parameters)
        if self._reads:
            self._query_norm = torch.stack([(read.query * read.gain).float().norm() for read in self._reads])

    def _by_group(self, tensors: list[Tensor | None]) -> Tensor:
        """Sum of squares over each group, float32 [groups]; a parameter without a gradient adds nothing."""
        norms = iter(torch._foreach_norm([t for t in tensors if t is not None], 2, dtype=torch.float32))
        every = torch.stack([self._zero if t is None else next(norms) for t in tensors])
        return torch.zeros(len(self._groups), device=every.device).index_add_(0, self._row, every * every)

    def finish(self) -> dict[str, Tensor]:
        """param_grad_norm and param_norm [L], other_grad_norm and grad_norm []; empty if no backward ran."""
        if self._squares is None:
            return {}
        metrics = {
            "param_grad_norm": self._squares[:-1].sqrt(),
            "other_grad_norm": self._squares[-1].sqrt(),
            "grad_norm": self._squares.sum().sqrt(),
            "param_norm": self._norm_squares[:-1].sqrt(),
        }
        if self._query_norm is not None:
            metrics["query_norm"] = self._query_norm
        return metrics
