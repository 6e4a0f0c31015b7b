"""Taps: hooks on a model's sites that feed the statistics. They add no node to the autograd graph.

`mode` says what is looked at. torch.compile guards on what follows from it, so a compiled model has one graph
for each mode (off, vectors, matrices) and recompiles no further. Backward taps are tensor hooks, which the
compiler traces into the backward graph.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.sites import Sites
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
        self._block_rows = _block_rows(sites)
        device = next(sites.root.parameters()).device
        sizes = {"state": len(sites.layers) + 1, "output": len(sites.layers) + 1}
        if self._block_rows is None:
            sizes["block"] = len(_last_layers(sites))
        self._forward = {place: Moments(rows, device) for place, rows in sizes.items()}
        self._backward = {place: Moments(rows, device) for place, rows in sizes.items()}
        self._depth = DepthSums([read.depth_sources for read in sites.reads], device) if sites.reads else None
        self._mean_squares: dict[int, tuple[Tensor, Tensor]] = {}
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

    def detach(self) -> None:
        """Take every hook off the model."""
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
        if self.mode == MATRICES and self._depth is not None:
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

    def _attach(self) -> None:
        sites = self._sites
        self._handles.append(sites.root.register_forward_pre_hook(Hook(self._begin)))
        if sites.reads:
            self._before(sites.reads[0], lambda given: self._tap(given[0], "output", 0))
        else:
            # What the first layer receives is the embedding: with its position and dropout, where a model has
            # them.
            self._before(sites.layers[0].norm, lambda given: self._tap(given, "output", 0))
        for row, site in enumerate(sites.layers):
            self._before(site.norm, lambda given, row=row: self._tap(given, "state", row))
            self._after(site.sublayer, lambda given, out, row=row: self._output(given, _first(out), row + 1))
        final = len(sites.layers)
        self._before(sites.final_norm, lambda given: self._tap(given, "state", final))
        for row, read in enumerate(sites.reads):
            self._after(read, lambda given, out, row=row: self._read(row, given, out[1]))
        if "block" in self._forward:
            for block, read in enumerate(_reads_after_blocks(sites)):
                # The newest source of the read after a transformer block is the partial sum the block left.
                self._before(read, lambda given, block=block: self._tap(given[-1], "block", block))
        self._handles.append(sites.root.register_forward_hook(Hook(self._end)))

    def _begin(self, root: nn.Module, args) -> None:
        # Validation and generation forwards are not recorded; recomputation in backward finds `_live` off.
        training = root.training and torch.is_grad_enabled()
        if training:
            self.seen = True
        self._live = training and self._looking
        self._mean_squares.clear()  # a forward that raised left its own behind

    def _end(self, root: nn.Module, args, output) -> None:
        self._live = False
        self._mean_squares.clear()

    def _before(self, module: nn.Module, action: Callable) -> None:
        def hook(module, args, kwargs):
            if self._live:
                self._timed(action, _given(args, kwargs))

        self._handles.append(module.register_forward_pre_hook(Hook(hook), with_kwargs=True))

    def _after(self, module: nn.Module, action: Callable) -> None:
        def hook(module, args, kwargs, output):
            if self._live:
                self._timed(action, _given(args, kwargs), output)

        self._handles.append(module.register_forward_hook(Hook(hook), with_kwargs=True))

    def _timed(self, action: Callable, *values) -> None:
        if torch.compiler.is_compiling():
            action(*values)
            return
        started = time.perf_counter()
        action(*values)
        self.seconds += time.perf_counter() - started

    def _tap(self, x: Tensor, place: str, row: int) -> None:
        if not isinstance(x, Tensor):  # the recorder says which rows were never seen
            return
        forward, backward = self._forward[place], self._backward[place]
        add_moments(x.detach(), forward.squares, forward.count, row)
        if not x.requires_grad:
            return
        if torch.compiler.is_compiling():
            _tap_gradient_in_graph(x, backward.squares, backward.count, row)
        else:
            x.register_hook(
                lambda gradient: self._timed(
                    add_moments, gradient.detach(), backward.squares, backward.count, row
                )
            )

    def _output(self, given, x: Tensor, row: int) -> None:
        # An output with an axis more than the input is not what is added to the stream, but a stack that holds
        # it: better blank than wrong.
        if isinstance(x, Tensor) and isinstance(given, Tensor) and x.ndim > given.ndim:
            return
        self._tap(x, "output", row)

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


def _given(args: tuple, kwargs: dict):
    """The first argument a module was called with, by position or by name; None without any."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _first(output) -> Tensor:
    """The tensor a sublayer adds to the stream: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def _last_layers(sites: Sites) -> list[int]:
    """Index of the last layer of each transformer block."""
    return list({site.layer.block: site.layer.index for site in sites.layers}.values())


def _reads_after_blocks(sites: Sites) -> list[nn.Module]:
    return [sites.reads[layer] for layer in _last_layers(sites)]


def _block_rows(sites: Sites) -> tuple[str, list[int]] | None:
    """Where block_rms is found among the other rows: a plain residual's is the next state, Full AttnRes' the
    output of the last layer. None for Block AttnRes, whose partial sums need taps of their own."""
    last = _last_layers(sites)
    if not sites.reads:
        return "state", last
    if sites.reads[-1].depth_sources == len(sites.layers) + 1:
        return "output", last
    return None
