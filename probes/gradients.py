"""Parameter norms and gradient norms by layer, measured when a backward pass ends.

That moment is after accumulation and before any clipping, in eager and in compiled training alike. With
several micro-batches each backward measures again and the last one, the accumulated gradient, stands.
"""

import torch
from torch import Tensor, nn

from probes.backwards import GradientMark
from probes.found import FoundRead
from probes.sites import Sites
from probes.statistics import norm_of

NORMS = ("param_grad_norm", "other_grad_norm", "grad_norm", "clip_factor", "param_norm", "query_norm")


class GradientNorms:
    """`measure` at the end of a backward pass, `take` when an optimizer takes the gradients; then `finish`."""

    def __init__(self, sites: Sites):
        self._root, self._reads, self._found = sites.root, sites.reads, sites.found
        layers = sites.layer_parameters()
        inside = {p for group in layers for p in group}
        others = [p for p in sites.root.parameters() if p not in inside]
        self._groups = [*layers, others]
        self._parameters = [p for group in self._groups for p in group]
        self._unknown = [row for row, group in enumerate(layers) if not group]
        self._place = {p: i for i, p in enumerate(self._parameters)}
        self._row = torch.tensor([row for row, group in enumerate(self._groups) for _ in group])
        self.reset()

    def watched(self) -> list[nn.Parameter]:
        """One parameter per group: enough to notice a backward pass; a whole model's worth of hooks is not
        needed."""
        trained = ([p for p in group if p.requires_grad] for group in self._groups)
        return [group[0] for group in trained if group]

    def replaced(self) -> bool:
        """Whether the model's parameters are others by now."""
        return any(p not in self._place for p in self._root.parameters())

    def reset(self) -> None:
        self.squares: Tensor | None = None  # of each parameter's gradient, as autograd left it
        self._norm_squares: Tensor | None = None
        self._query_norm: Tensor | None = None
        self._left: list[GradientMark | None] = []
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def measure(self, parameters: bool) -> None:
        """Norms of the gradients as they are now, and where wanted those of the parameters."""
        gradients = [p.grad for p in self._parameters]
        if all(gradient is None for gradient in gradients):
            self.squares = None
            raise RuntimeError(
                "the gradients were gone when the backward pass ended, as where optimizers step within it"
            )
        self.squares = _squares(gradients)
        self._left = [GradientMark.of(g) for g in gradients]
        if parameters:
            self._norm_squares = self._by_group(_squares(self._parameters))
        if self._found is not None:
            self._query_norm = torch.stack(
                [_query_norm(read, self._parameters[0].device) for read in self._found.reads]
            )
        elif self._reads:
            self._query_norm = torch.stack([(read.query * read.gain).float().norm() for read in self._reads])

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, before: Tensor | None, now: Tensor | None) -> None:
        """The optimizer is about to step: by how much has the script changed its gradients since backward?

        `before` and `now` are the loss scales in the gradients at the end of backward and now (None: 1).
        """
        if self.squares is None or id(optimizer) in self._taken:
            return
        places = [
            self._place[p]
            for group in optimizer.param_groups
            for p in group["params"]
            if p in self._place and self._left[self._place[p]] is not None
        ]
        if not places:
            return
        if not any(self._left[i].changed(self._parameters[i].grad) for i in places):
            # Nobody wrote to them, as far as autograd can tell; `.data` goes unnoticed, so the small ones are
            # looked at all the same.
            small = [i for i in places if self._parameters[i].ndim < 2]
            places = small or [min(places, key=lambda i: self._parameters[i].numel())]
        found = _squares([self._parameters[i].grad for i in places]).sum()
        expected = torch.stack([self.squares[i] for i in places]).sum()
        self._taken[id(optimizer)] = _unscaled(expected, before, 2), _unscaled(found, now, 2)

    def finite(self) -> Tensor:
        """Whether the gradients were finite at the end of backward, bool [] on the device."""
        return torch.isfinite(self.squares).all()

    def finish(self, scale: Tensor | None = None) -> dict[str, Tensor]:
        """param_grad_norm and param_norm [L], other_grad_norm, grad_norm and clip_factor []; what was not measured is
        left out. Gradients are divided by the loss `scale`."""
        if self.squares is None:
            return {}
        squares = self._by_group(self.squares)
        metrics = {
            "param_grad_norm": self._blank(_unscaled(squares[:-1].sqrt(), scale)),
            "other_grad_norm": _unscaled(squares[-1].sqrt(), scale),
            "grad_norm": _unscaled(squares.sum().sqrt(), scale),
        }
        if self._norm_squares is not None:
            metrics["param_norm"] = self._blank(self._norm_squares[:-1].sqrt())
        if self._taken:
            before, now = (torch.stack(parts).sum() for parts in zip(*self._taken.values(), strict=True))
            # Nothing was clipped of a gradient of zero.
            metrics["clip_factor"] = (now / before).sqrt().where(before != 0, 1)
        if self._query_norm is not None:
            metrics["query_norm"] = self._query_norm
        return metrics

    def _blank(self, norms: Tensor) -> Tensor:
        """Norms of the layers, NaN where it is not known which parameters are a layer's (marks.py)."""
        for row in self._unknown:
            norms[row] = torch.nan
        return norms

    def _by_group(self, squares: Tensor) -> Tensor:
        """[parameters] -> [groups]."""
        self._row = self._row.to(squares.device)
        return torch.zeros(len(self._groups), device=squares.device).index_add_(0, self._row, squares)


def _query_norm(read: FoundRead, device: torch.device) -> Tensor:
    """Norm of a found read's query, NaN where it has none or its making is not understood; float32 []."""
    vectors = [getattr(module, name).flatten().float() for module, name in read.query]
    return torch.stack(vectors).prod(0).norm() if vectors else torch.full((), torch.nan, device=device)


def _squares(tensors: list[Tensor | None]) -> Tensor:
    """Sum of squares of each tensor, float32 [tensors]; a parameter without a gradient has none."""
    present = [t for t in tensors if t is not None]
    if not present:
        return torch.zeros(len(tensors))
    norms = iter(_norms(present))
    zero = torch.zeros((), device=present[0].device)
    every = torch.stack([zero if t is None else next(norms) for t in tensors])
    return every * every


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, float32."""
    if tensors[0].device.type == "cpu":
        return [norm_of(t) for t in tensors]
    wide = any(t.dtype == torch.float64 for t in tensors)
    # A few kernels for all of them.
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64 if wide else torch.float32)
    return [norm.float() for norm in norms]


def _unscaled(value: Tensor, scale: Tensor | None, power: int = 1) -> Tensor:
    return value if scale is None else value / scale.to(value.device) ** power
