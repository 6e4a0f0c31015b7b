"""Parameter norms and gradient norms by layer, measured when a backward pass ends.

That moment is after accumulation and before any clipping, in eager and in compiled training alike. With
several micro-batches each backward measures again and the last one, the accumulated gradient, stands. What is kept are
squares, which add up over processes too.
"""

import torch
from torch import Tensor, nn

from probes.backwards import GradientMark
from probes.parallel import Parallel, local
from probes.sites import Sites
from probes.statistics import norm_of

NORMS = ("param_grad_norm", "other_grad_norm", "grad_norm", "clip_factor", "param_norm", "query_norm")


class GradientNorms:
    """`measure` at the end of a backward pass, `take` when an optimizer takes the gradients; then `finish`."""

    def __init__(self, sites: Sites, parallel: Parallel | None = None):
        self._parallel = parallel
        self._root, self._reads, self._found = sites.root, sites.reads, sites.found
        layers = sites.layer_parameters()
        inside = {p for group in layers for p in group}
        others = [p for p in sites.root.parameters() if p not in inside]
        self._groups = [*layers, others]
        self._parameters = [p for group in self._groups for p in group]
        self._unknown = [row for row, group in enumerate(layers) if not group]
        self._place = {p: i for i, p in enumerate(self._parameters)}
        self._row = torch.tensor([row for row, group in enumerate(self._groups) for _ in group])
        # Of which parameters this process tells; None: all.
        self._told = None if parallel is None else [parallel.tells_of(p) for p in self._parameters]
        # Those whose gradient is known when the parts of all processes have been added up.
        self._whole = [
            i for i, p in enumerate(self._parameters) if parallel is not None and parallel.whole(p)
        ]
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
        self._squared: list[bool] | None = (
            None  # of which gradients this process tells the squares; None: all
        )
        self.squares: Tensor | None = None  # of each parameter's gradient, as autograd left it
        self._norm_squares: Tensor | None = None  # by group
        self._query_squares: Tensor | None = None
        self._parts: Tensor | None = None  # of the gradients of `_whole`, flat
        self._left: list[GradientMark | None] = []
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def measure(self, parameters: bool) -> None:
        """Norms of the gradients as they are now, and where wanted those of the parameters."""
        gradients = [p.grad for p in self._parameters]
        if all(gradient is None for gradient in gradients):
            self.squares = None
            if self._parallel is not None and self._parallel.holds_back:
                return
            raise RuntimeError(
                "the gradients were gone when the backward pass ended, as where optimizers step within it"
            )
        if self._whole:
            pairs = [(gradients[i], self._parameters[i]) for i in self._whole]
            self._parts = torch.cat([self._parallel.part(*pair) for pair in pairs])
        left_out = set(self._whole)
        self.squares = _squares([None if i in left_out else g for i, g in enumerate(gradients)])
        if self._told is not None:
            # A gradient may be spread in another way than its parameter.
            self._squared = [
                g is not None and i not in left_out and self._parallel.tells_of(g)
                for i, g in enumerate(gradients)
            ]
        self._left = [GradientMark.of(g) for g in gradients]
        if parameters:
            self._norm_squares = self._by_group(_squares(self._parameters), self._told)
        device = local(self._parameters[0]).device
        if self._found is not None:
            queries = [[getattr(*each) for each in read.query] for read in self._found.reads]
            self._query_squares = torch.stack([self._query_square(each, device) for each in queries])
        elif self._reads:
            queries = [[read.query, read.gain] for read in self._reads]
            self._query_squares = torch.stack([self._query_square(each, device) for each in queries])

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
        if self._squared is not None:
            places = [i for i in places if self._squared[i]]
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
        return self.finished(self.sums(), scale)

    def sums(self) -> dict[str, Tensor]:
        """The squares of what was measured, of the parameters of which this process tells: "gradients" and "parameters"
        [groups], "before" and "after" clipping [], "queries" [R]."""
        if self.squares is None:
            return {}
        sums = {"gradients": self._by_group(self.squares, self._squared)}
        if self._parts is not None:
            sums["parts"] = self._parts
        if self._taken:
            taken = zip(*self._taken.values(), strict=True)
            sums["before"], sums["after"] = (torch.stack(parts).sum() for parts in taken)
        if self._norm_squares is not None:
            sums["parameters"] = self._norm_squares
        if self._query_squares is not None:
            sums["queries"] = self._query_squares
        return sums

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of everything that `sums` may hold."""
        reads = len(self._found.reads) if self._found is not None else len(self._reads)
        groups = (len(self._groups),)
        parts = (sum(self._parameters[i].numel() for i in self._whole),)
        return {
            "parts": parts,
            "gradients": groups,
            "parameters": groups,
            "before": (),
            "after": (),
            "queries": (reads,),
        }

    def finished(
        self, sums: dict[str, Tensor], scale: Tensor | None, staged: bool = False
    ) -> dict[str, Tensor]:
        """The metrics that such sums make; of a `staged` model those of all stages, as of all layers."""
        if "gradients" not in sums:
            return {}
        squares = sums["gradients"]
        if "parts" in sums:
            each = sums["parts"].split([self._parameters[i].numel() for i in self._whole])
            rows = self._row[self._whole].to(squares.device)
            squares = squares.index_add(0, rows, torch.stack([(part * part).sum() for part in each]))
        metrics = {
            "param_grad_norm": self._blank(_unscaled(squares[:-1].sqrt(), scale), staged),
            "other_grad_norm": _unscaled(squares[-1].sqrt(), scale),
            "grad_norm": _unscaled(squares.sum().sqrt(), scale),
        }
        if "parameters" in sums:
            metrics["param_norm"] = self._blank(sums["parameters"][:-1].sqrt(), staged)
        if "before" in sums:
            # Nothing was clipped of a gradient of zero.
            metrics["clip_factor"] = (sums["after"] / sums["before"]).sqrt().where(sums["before"] != 0, 1)
        if "queries" in sums:
            metrics["query_norm"] = sums["queries"].sqrt()
        return metrics

    def _blank(self, norms: Tensor, staged: bool) -> Tensor:
        """Norms of the layers, NaN where it is not known which parameters are a layer's (marks.py)."""
        for row in () if staged else self._unknown:  # no stage is marked
            norms[row] = torch.nan
        return norms

    def _by_group(self, squares: Tensor, told: list[bool] | None) -> Tensor:
        """[parameters] -> [groups], of those that are `told`."""
        self._row = self._row.to(squares.device)
        if told is not None:
            squares = torch.stack(
                [each if tell else torch.zeros_like(each) for each, tell in zip(squares, told, strict=True)]
            )
        return torch.zeros(len(self._groups), device=squares.device).index_add_(0, self._row, squares)

    def _query_square(self, vectors: list[Tensor], device: torch.device) -> Tensor:
        """Squared norm of a product of vectors that is a read's query, NaN where there are none, for its making is not
        understood; float32 []."""
        if not vectors:
            return torch.full((), torch.nan, device=device)
        place = self._place.get(vectors[0], 0)
        if self._told is not None and not self._told[place]:
            return torch.zeros((), device=device)
        norm = torch.stack([local(each).flatten().float() for each in vectors]).prod(0).norm()
        return norm * norm


def _squares(tensors: list[Tensor | None]) -> Tensor:
    """Sum of squares of each tensor, float32 [tensors]; a parameter without a gradient has none."""
    tensors = [None if t is None else local(t) for t in tensors]
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
