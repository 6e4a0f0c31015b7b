"""Taps: hooks on a model's sites that feed the statistics. They add no node to the autograd graph.

`mode` says what is looked at. torch.compile guards on what follows from it, so a compiled model has one graph
for each mode (off, vectors, matrices) and recompiles no further. Backward taps are tensor hooks, which the
compiler traces into the backward graph.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes import marks
from probes.identity import Sample, keep_sample
from probes.sites import Place, Sites
from probes.statistics import DEPTH_METRICS, DepthSums, Moments, add_moments, token_mean_square

OFF, VECTORS, MATRICES = 0, 1, 2


@torch._dynamo.allow_in_graph
def _tap_gradient_in_graph(x: Tensor, squares: Tensor, count: Tensor, row: int) -> None:
    # Opaque to dynamo on purpose: where it traces `register_hook` itself, torch 2.13 forgets what the model
    # assigned to attributes of Python objects, and the compiled model computes something else.
    def tap(gradient: Tensor) -> None:
        add_moments(gradient, squares, count, row)

    x.register_hook(tap)


class Hook:
    """A hook on a module of the recorded model. In a copy or a pickle of that model it does nothing.

    A closure would not do: copies would be recorded too, and pickling fails.
    """

    def __init__(self, action: Callable | None = None):
        self._action = action

    def __call__(self, *values) -> None:
        if self._action is not None:
            self._action(*values)

    def __deepcopy__(self, memo: dict) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple:
        return Hook, ()


class Taps:
    """All taps of one model. Set `mode` between steps; `finish` gives a step's metrics, `reset` clears."""

    def __init__(self, sites: Sites):
        self._mode = OFF
        # Booleans, for the compiler would make a number that changes a symbol, and compile graphs for it.
        self._looking = self._matrices = False
        self.seen = False  # a training forward has begun since the last optimizer step
        self.seconds = 0.0  # host time inside eager taps
        self._live = False  # inside a training forward that is looked at
        self._sites = sites
        device = next(sites.root.parameters()).device
        self._block_rows = _block_rows(sites, device)
        sizes = {"state": len(sites.layers) + 1, "output": len(sites.layers) + 1}
        if self._block_rows is None:
            sizes["block"] = len(_last_layers(sites))
        self._forward = {place: Moments(rows, device) for place, rows in sizes.items()}
        self._backward = {place: Moments(rows, device) for place, rows in sizes.items()}
        self._depth = DepthSums([read.depth_sources for read in sites.reads], device) if sites.reads else None
        self._sample = Sample([site.given for site in sites.layers], device)
        self._mean_squares: dict[int, tuple[Tensor, Tensor]] = {}
        self._summed_rows, self._kept_rows = _rows_by_arithmetic(sites)
        self._unhooked = _unhooked_rows(sites)
        self._states: dict[
            int, Tensor
        ] = {}  # by row, where an output is a difference of states or a state a sum
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    @property
    def mode(self) -> int:
        return self._mode

    @mode.setter
    def mode(self, mode: int) -> None:
        self._mode = mode
        self._looking = mode != OFF
        self._matrices = mode == MATRICES

    @property
    def nbytes(self) -> int:
        """Memory held on the device, in bytes."""
        parts = [*self._forward.values(), *self._backward.values(), self._sample, self._depth]
        tensors = [
            t for part in parts if part is not None for t in vars(part).values() if isinstance(t, Tensor)
        ]
        return sum(t.nbytes for t in tensors)

    def detach(self) -> None:
        """Take every hook off the model."""
        marks.forget(self)
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        self.seconds = 0.0
        for moments in (*self._forward.values(), *self._backward.values()):
            moments.reset()
        if self._depth is not None:
            self._depth.reset()

    def finish(self) -> dict[str, Tensor]:
        """Metrics of the step just taken, float32 on the device, by name of the vocabulary."""
        metrics = {}
        for suffix, table in (("rms", self._forward), ("grad_rms", self._backward)):
            done = {place: moments.finish() for place, moments in table.items()}
            metrics[f"hidden_{suffix}"] = done["state"]
            metrics[f"output_{suffix}"] = done["output"]
            if self._block_rows is None:
                metrics[f"block_{suffix}"] = done["block"]
            else:
                place, rows = self._block_rows
                metrics[f"block_{suffix}"] = done[place][rows]
        if self.mode == MATRICES:
            metrics["identity_error"] = self._sample.finish()
            if self._depth is not None:
                metrics |= self._depth.finish()
        return metrics

    def counts(self) -> dict[str, Tensor]:
        """How much each row of the metrics of `finish` has seen, by name; zero for a row that saw nothing."""
        counts = {}
        for suffix, table in (("rms", self._forward), ("grad_rms", self._backward)):
            counts[f"hidden_{suffix}"] = table["state"].count
            counts[f"output_{suffix}"] = table["output"].count
            place, rows = self._block_rows or ("block", slice(None))
            counts[f"block_{suffix}"] = table[place].count[rows]
        if self.mode == MATRICES and self._depth is not None:
            counts |= dict.fromkeys(DEPTH_METRICS, self._depth.tokens)
        return counts

    def marked(self, x: Tensor, place: str, row: int) -> None:
        """A tensor that the author has named; only for rows that no hook sees."""
        if self._live and row in self._unhooked[place]:
            self._timed(self._tap, x, place, row)

    def _attach(self) -> None:
        sites = self._sites
        marks.listen(self)
        self._handles.append(sites.root.register_forward_pre_hook(Hook(self._begin)))
        if sites.reads:
            self._before(sites.reads[0], lambda args, kwargs: self._tap(args[0][0], "output", 0))
        for row, site in enumerate(sites.layers):
            if site.state is not None:
                self._at(site.state, lambda x, row=row: self._state(x, row))
            if site.output is not None:
                self._at(site.output, lambda x, row=row: self._output(x, row))
            elif site.after is not None:
                self._at(site.after, lambda x, row=row: self._difference(x, row))
        if sites.final is not None:
            self._at(sites.final, lambda x: self._state(x, len(sites.layers)))
        for row, read in enumerate(sites.reads):
            self._after(read, lambda args, kwargs, output, row=row: self._read(row, args[0], output[1]))
        if "block" in self._forward:
            for block, read in enumerate(_reads_after_blocks(sites)):
                # The newest source of the read after a transformer block is the partial sum the block left.
                self._before(read, lambda args, kwargs, block=block: self._tap(args[0][-1], "block", block))
        self._handles.append(sites.root.register_forward_hook(Hook(self._end)))

    def _begin(self, root: nn.Module, args) -> None:
        # Validation and generation forwards are not recorded; recomputation in backward finds `_live` off.
        training = root.training and torch.is_grad_enabled()
        if training:
            self.seen = True
        self._live = training and self._looking
        self._forget()  # a forward that raised left its own behind

    def _end(self, root: nn.Module, args, output) -> None:
        self._live = False
        self._forget()

    def _forget(self) -> None:
        self._mean_squares.clear()
        self._states.clear()

    def _at(self, place: Place, action: Callable[[Tensor], None]) -> None:
        if place.is_input:
            self._before(place.module, lambda args, kwargs: action(place.given(args, kwargs)))
        else:
            self._after(place.module, lambda args, kwargs, output: action(place.made(output)))

    def _before(self, module: nn.Module, action: Callable) -> None:
        def hook(module, args, kwargs):
            if self._live:
                self._timed(action, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(Hook(hook), with_kwargs=True))

    def _after(self, module: nn.Module, action: Callable) -> None:
        def hook(module, args, kwargs, output):
            if self._live:
                self._timed(action, args, kwargs, output)

        self._handles.append(module.register_forward_hook(Hook(hook), with_kwargs=True))

    def _timed(self, action: Callable, *values) -> None:
        if torch.compiler.is_compiling():
            action(*values)
            return
        started = time.perf_counter()
        action(*values)
        self.seconds += time.perf_counter() - started

    def _state(self, x: Tensor, row: int) -> None:
        """What layer row+1 receives, or the final state; the first one is the embedding too."""
        self._tap(x, "state", row)
        if row == 0 and not self._sites.reads:
            # With its position and dropout, where a model has them.
            self._tap(x, "output", 0)
        if row in self._kept_rows and isinstance(x, Tensor):
            self._states[row] = x.detach()

    def _output(self, x: Tensor, row: int) -> None:
        """What layer row+1 adds to the stream."""
        if not isinstance(x, Tensor) or (self._sites.reads and x.ndim > 3):
            # A stack that holds what is added to the stream among other things: better blank than wrong.
            return
        self._tap(x, "output", row + 1)
        if row + 1 in self._summed_rows and row in self._states:
            # No module receives the next state, so it is summed here. It is the output's only way on, so that the two
            # have one gradient.
            state = self._states[row] + x.detach()
            self._tap_values(state, "state", row + 1)
            self._tap_gradient(x, "state", row + 1)
            if row + 1 in self._kept_rows:
                self._states[row + 1] = state

    def _difference(self, after: Tensor, row: int) -> None:
        """What layer row+1 has added, where the stream is seen before and after it. It has the stream's gradient."""
        if row in self._states and isinstance(after, Tensor):
            self._tap_values(after.detach() - self._states[row].view_as(after), "output", row + 1)
            self._tap_gradient(after, "output", row + 1)

    def _tap(self, x: Tensor, place: str, row: int) -> None:
        if isinstance(x, Tensor):  # the recorder says which rows were never seen
            self._tap_values(x.detach(), place, row)
            self._tap_gradient(x, place, row)

    def _tap_values(self, x: Tensor, place: str, row: int) -> None:
        moments = self._forward[place]
        add_moments(x, moments.squares, moments.count, row)
        if self._matrices and place != "block":
            keep_sample(x, self._sample.of(place), row)

    def _tap_gradient(self, x: Tensor, place: str, row: int) -> None:
        if not x.requires_grad:
            return
        moments = self._backward[place]
        if torch.compiler.is_compiling():
            _tap_gradient_in_graph(x, moments.squares, moments.count, row)
        else:
            x.register_hook(
                lambda gradient: self._timed(
                    add_moments, gradient.detach(), moments.squares, moments.count, row
                )
            )

    def _read(self, row: int, sources: list[Tensor], weight: Tensor) -> None:
        if self._matrices:
            self._depth.add(row, weight, [self._mean_square(source) for source in sources])

    def _mean_square(self, source: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler removes the repeated computation by itself
            return token_mean_square(source)
        # A source is read many times in one forward; keeping the tensor beside its result keeps its id from
        # reuse.
        if id(source) not in self._mean_squares:
            self._mean_squares[id(source)] = source, token_mean_square(source)
        return self._mean_squares[id(source)][1]


def _last_layers(sites: Sites) -> list[int]:
    """Index of the last layer of each transformer block."""
    return list({site.layer.block: site.layer.index for site in sites.layers}.values())


def _reads_after_blocks(sites: Sites) -> list[nn.Module]:
    return [sites.reads[layer] for layer in _last_layers(sites)]


def _block_rows(sites: Sites, device: torch.device) -> tuple[str, Tensor] | None:
    """Where block_rms is found among the other rows: a plain residual's is the next state, Full AttnRes' the
    output of the last layer. None for Block AttnRes, whose partial sums need taps of their own."""
    # On the device, for indexing with a list copies the list there and waits for it.
    last = torch.tensor(_last_layers(sites), device=device)
    if not sites.reads:
        return "state", last
    if sites.reads[-1].depth_sources == len(sites.layers) + 1:
        return "output", last
    return None


def _rows_by_arithmetic(sites: Sites) -> tuple[set[int], set[int]]:
    """Rows of states that are summed from the state and the output before, and of those kept for a sum or difference."""
    before = [None, *sites.layers]
    summed = {
        row
        for row, site in enumerate(sites.layers)
        if site.state is None and before[row] is not None and before[row].output is not None
    }
    differences = {
        row for row, site in enumerate(sites.layers) if site.output is None and site.after is not None
    }
    return summed, {row - 1 for row in summed} | differences


def _unhooked_rows(sites: Sites) -> dict[str, set[int]]:
    """Rows that no hook sees, by place: those that marks may fill."""
    summed, _ = _rows_by_arithmetic(sites)
    states = {row for row, site in enumerate(sites.layers) if site.state is None and row not in summed}
    outputs = {row for row, site in enumerate(sites.layers, 1) if site.output is None and site.after is None}
    if sites.final is None:
        states.add(len(sites.layers))
    if 0 in states and not sites.reads:
        outputs.add(0)
    return {"state": states, "output": outputs}
