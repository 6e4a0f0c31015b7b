"""Taps: hooks on a model's sites that feed the statistics. They add no node to the autograd graph.

`mode` says what is looked at. torch.compile guards on what follows from it, so a compiled model has one graph
for each mode (off, vectors, matrices) and recompiles no further. Backward taps are tensor hooks, which the
compiler traces into the backward graph.
"""

import torch
from torch import Tensor, nn

from probes.backwards import in_backward
from probes.depth_taps import DepthTaps
from probes.edge_taps import EdgeTaps
from probes.expert_taps import ExpertTaps
from probes.faults import Faults
from probes.final_taps import FinalTaps
from probes.found_taps import FoundTaps
from probes.hanging import Hanging
from probes.hooks import Hook, tap_gradient_in_graph
from probes.made_taps import MadeTaps
from probes.marked_taps import MarkedTaps
from probes.masks import Masks, fitting, where_known
from probes.parallel import is_split
from probes.pipeline import Stage
from probes.rows import reads_after_blocks
from probes.sampled import SAMPLED_METRICS
from probes.scaling import half_precision
from probes.sites import Sites
from probes.statistics import DEPTH_METRICS, add_moments, add_nonfinite
from probes.sum_taps import SumTaps
from probes.tally import ACTIVATIONS, Tally
from probes.torn import names_of, torn

OFF, VECTORS, MATRICES = 0, 1, 2


class Taps(Hanging):
    """All taps of one model. Set `mode` between steps; `finish` gives a step's metrics, `reset` clears.

    At the end of each backward pass `commit` counts what it belongs to, or `drop` forgets it; `restart` forgets
    what was counted in this step.
    """

    def __init__(
        self,
        sites: Sites,
        masks: Masks | None = None,
        faults: Faults | None = None,
        share: int = 1,
        copies: int = 1,
        stage: Stage | None = None,
    ):
        self._stage = stage
        self._faults = faults or Faults(strict=True)
        super().__init__(self._faults)
        self._mode = OFF
        # Booleans, for the compiler would make a number that changes a symbol, and compile graphs for it.
        self._looking = self.matrices = False
        self.seen = False  # a training forward has begun since the last optimizer step
        self.half = False  # a training forward ran under float16 autocast
        self._embedded = False  # this forward's embedding has been seen
        # Of this forward, [B, T] among them, where there are streams to be told.
        self._given: list[torch.Size] = []
        self._sites, self._share = sites, share
        self._copies = copies  # processes that see the same sequence
        self.masks = masks or Masks(None, sites)
        self.mask: Tensor | None = None
        self._parameter = next(sites.root.parameters())
        self.edge_taps = EdgeTaps(sites, self)
        self.depths = DepthTaps(sites, self)
        self._tally_up()
        self._names = names_of({place: len(rows.rows) for place, rows in self._backward.items()})
        self._sums = SumTaps(sites, self)
        self.finals = FinalTaps(sites, self)
        self._marks = MarkedTaps(sites, self)
        self._found = FoundTaps(sites.found, sites.states_of_reads, self) if sites.found is not None else None
        self._made = MadeTaps(sites, self)
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
        self.matrices = mode == MATRICES

    @property
    def tally(self) -> Tally:
        """The sums of this step."""
        return self._tally

    @property
    def nbytes(self) -> int:
        """Memory held on the device, in bytes."""
        return self._tally.nbytes

    def detach(self) -> None:
        """Take every hook off the model."""
        self._marks.close()
        super().detach()

    def _tally_up(self) -> None:
        """Empty sums where the model is. The names below are guarded by the compiler, which wants few steps to them."""
        before = getattr(self, "_tally", None)
        self._tally = Tally(self._sites, self._parameter.device, self._share)
        self._tally.lost_final = before is not None and before.lost_final
        self._device = self._tally.device
        self._autocasts = torch.amp.is_autocast_available(self._device.type)
        live = self._tally.live
        self._forward, self._backward = live.forward, live.backward
        self._nonfinite, self.depths.sums, self.experts = live.nonfinite, live.depth, live.experts
        self.state_counts = live.forward["state"].count
        self.read_errors = self._tally.errors
        self.edges = live.edges.rows if live.edges is not None else []
        self.edge_taps.follow(self._device)
        self._sample, self._calls, self.passes = self._tally.sample, self._tally.calls, self._tally.passes

    def follow(self) -> None:
        """Go where the model went, with empty sums."""
        self._parameter = next(self._sites.root.parameters())  # moving may have replaced it
        if self._parameter.device != self._device:
            self._tally_up()

    def commit(self) -> None:
        self.gradients.forget_newest()
        self.passes.commit()
        self._tally.torn = torn(self._names, self._sites.has_reads)

    def drop(self) -> None:
        self.gradients.forget_newest()
        self.passes.drop()

    def forget_gradients(self) -> None:
        self.gradients.forget_newest()
        self.passes.forget_gradients()

    def restart(self) -> None:
        self.passes.restart()

    @property
    def repeated(self) -> list[str]:
        """Names of layers that ran more than once in one forward."""
        rows = {row for place, row in self.passes.repeated if place == "output"}
        return [site.layer.name for row, site in enumerate(self._sites.layers, 1) if row in rows]

    @property
    def torn(self) -> set[tuple[str, int]]:
        """Rows whose gradients are blank, for the compiler has ended a graph within a layer."""
        return self._tally.torn

    @property
    def misplaced(self) -> int | None:
        """Of layers that the user named, the first row of a state that cannot be that of its layer."""
        return self._tally.misplaced

    def reset(self) -> None:
        self._seconds = 0.0
        self.gradients.reset()
        self._tally.reset()
        self.edge_taps.reset()
        if self.matrices:
            self._sample.reset()

    def finish(self) -> dict[str, Tensor]:
        """Metrics of the step just taken, float32 on the device, by name of the vocabulary."""
        return self._tally.finish(self.matrices)

    def sampled(self) -> dict[str, Tensor]:
        """The sample of this step, by name; nothing where no matrices are recorded."""
        return self._tally.sampled() if self.matrices else {}

    def counts(self) -> dict[str, Tensor]:
        """How much each row of the metrics of `finish` has seen, by name; zero for a row that saw nothing."""
        return self._tally.counts(self.matrices)

    def _attach(self) -> None:
        sites = self._sites
        self._marks.listen()
        self._handles.append(sites.called.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
        if sites.reads:
            self.before(sites.reads[0], lambda args, kwargs: self.tap_embedding(args[0][0]))
        for holder, find in self.masks.inside:
            self.before(holder, lambda args, kwargs, find=find: self._mask_inside(find(args, kwargs, ...)))
        if sites.entry is not None and not sites.reads:
            self.at(sites.entry, self._entry)
        for row, site in enumerate(sites.layers):
            if site.state is not None:
                self.at(site.state, lambda x, row=row: self._state(x, row))
            if site.output is not None:
                self.at(site.output, lambda x, row=row: self._output(x, row))
            elif site.after is not None:
                self.at(site.after, lambda x, row=row: self._sums.after(x, row))
        self._made.attach()
        for module in sites.outputs:
            self.before(module, lambda args, kwargs, row=module.depth_output - 1: self._output(args[0], row))
        self.finals.attach()
        self.depths.attach()
        if self._found is not None:
            self._found.attach()
        ExpertTaps(sites.experts, self).attach()
        self.edge_taps.attach()
        if sites.norm is not None:
            self.before(sites.norm, lambda args, kwargs: self._passed())
        if "block" in self._forward and sites.reads:
            for block, read in enumerate(reads_after_blocks(sites)):
                # The newest source of the read after a transformer block is the partial sum the block left.
                self.before(read, lambda args, kwargs, block=block: self.tap(args[0][-1], "block", block))
        self._handles.append(sites.called.register_forward_hook(Hook(self._end)))

    def _passed(self) -> None:
        if torch.compiler.is_compiling():
            self._calls[1].add_(1)

    def _begin(self, root: nn.Module, args, kwargs) -> None:
        # Validation and generation forwards are not recorded, nor is a recomputation in backward.
        compiling = torch.compiler.is_compiling()
        training = root.training and torch.is_grad_enabled() and (compiling or not in_backward())
        if self._stage is not None:  # it is tried on tensors that hold anything
            training = training and self._stage.running
        if training:
            self.seen = True
            self.half = self._autocasts and half_precision(self._device.type)
        self.live = training and self._looking
        self._forget()  # a forward that raised left its own behind
        if not compiling:
            self._embedded = False
        if not self.live:
            return
        if self._sites.entry is not None or self._copies > 1:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim > 1]
            self._given = [each.shape[:2] for each in given]
        if not compiling:
            self.eagerly(self._begin_eagerly, "hidden_rms", "output_rms", "block_rms")
        elif self._parameter.device != self._device:
            self.live = False  # until `follow`
        if compiling:
            self.mask = self._find_mask(args, kwargs)
            return
        try:
            self.mask = self._find_mask(args, kwargs)
        except Exception as error:
            self.live = False  # rather nothing than padding
            self._faults.caught(error, *ACTIVATIONS, *DEPTH_METRICS, "nonfinite")

    def _begin_eagerly(self) -> None:
        self.follow()
        self.passes.begin()
        if self.matrices:
            self.edge_taps.begin()
            self._sample.reset()

    def _end(self, root: nn.Module, args, output) -> None:
        if self.live and not torch.compiler.is_compiling():
            self.eagerly(lambda: self.finals.end(output), "hidden_rms", "block_rms")
        self.live = False
        self.mask = None
        self._forget()

    def _forget(self) -> None:
        self.depths.forget()
        self.edge_taps.end()
        self._sums.forget()
        self.finals.forget()
        self._turns.clear()
        self._marks.forget()
        self._made.forget()
        if self._found is not None:
            self._found.forget()

    def _find_mask(self, args: tuple, kwargs: dict) -> Tensor | None:
        """Which tokens count, [B, T], not zero; None: all."""
        mask = self.masks.of_model(args, kwargs)
        # The compiler may take this hook for a function of its own: no operation here, or it is one more graph.
        if mask is None or torch.compiler.is_compiling():
            return mask
        self.passes.now.mask = mask != 0
        return self.passes.now.mask

    def _mask_inside(self, mask: object) -> None:
        """The mask given to a module between the model and its stack, as a decoder's beside that of its encoder. What
        models make of a mask of [B, T] for their own attention is none."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            return
        self.mask = mask
        if not torch.compiler.is_compiling() and not self.recomputing:
            self.passes.now.mask = None if mask is None else mask != 0

    def _state(self, x: Tensor, row: int) -> None:
        """What layer row+1 receives; the first one is the embedding too."""
        self.tap(x, "state", row)
        entered = self._sites.entry is not None and (torch.compiler.is_compiling() or self._embedded)
        if row == 0 and not self._sites.has_reads and not entered:
            # With its position and dropout, where a model has them.
            self.tap_embedding(x)
        self._sums.state(x, row)

    def made_state(self, x: Tensor, row: int) -> None:
        """The same, computed: it has no gradient."""
        self.values(x, "state", row)
        if row == 0 and not self._sites.has_reads and self._sites.entry is None:
            self.values(x, "output", 0)
        self._sums.state(x, row)

    def _entry(self, x: Tensor) -> None:
        """What the first of the blocks that mix streams is given: the embedding, or [B, T, n, D] copies of it."""
        if isinstance(x, Tensor) and (x.ndim < 4 or x.shape[:2] in self._given):
            self.tap_embedding(x, streams=x.ndim == 4)

    def _output(self, x: Tensor, row: int) -> None:
        """What layer row+1 adds to the stream."""
        if not isinstance(x, Tensor) or (self._sites.reads and x.ndim > 3):
            # A stack that holds what is added to the stream among other things; `sites.outputs` has it plain.
            return
        self.tap(x, "output", row + 1)
        self._sums.output(x, row)

    def tap(
        self,
        x: Tensor,
        place: str,
        row: int,
        streams: bool = False,
        turned: bool = False,
        known: Tensor | None = None,
    ) -> None:
        if isinstance(x, Tensor):  # the recorder says which rows were never seen
            values = x.detach()[..., 0, :] if streams else x.detach()
            self.values(values.transpose(0, 1) if turned else values, place, row, known)
            self.gradient(x, place, row, streams, known)
            self.finals.met(x)

    def values(self, x: Tensor, place: str, row: int, known: Tensor | None = None) -> None:
        """Add the values of `x`; where `known` (bool []) is false, of no token."""
        if torch.compiler.is_compiling():
            mask = where_known(fitting(self.mask, x), known, x)
            self._add_values(x, place, row, mask)
            self._keep(x, place, row, mask)
        elif not self.recomputing:
            if row <= len(self._sites.layers):  # what the final norm is given comes where it may
                self.passes.now.calls[place, row] += 1
            mask = fitting(self.passes.now.mask, x)
            if mask is None and self.passes.now.mask is not None and place == "state":
                # It may be that of another stack, or leave out tokens that the model adds.
                self.masks.odd = True
            mask = where_known(mask, known, x)
            self.eagerly(lambda: self._add_values(x, place, row, mask), *self._tally.metrics_of(place, "rms"))
            self.eagerly(lambda: self._keep(x, place, row, mask), "identity_error", *SAMPLED_METRICS)

    def _keep(self, x: Tensor, place: str, row: int, mask: Tensor | None) -> None:
        if self.matrices and place != "block":
            self._sample.keep(x, place, row, mask)
            if place == "output":
                self.edge_taps.output(x, row)

    def _add_values(self, x: Tensor, place: str, row: int, mask: Tensor | None) -> None:
        forward = self._forward[place]
        add_moments(x, forward.squares[row], forward.count[row], mask)
        if self.matrices and place == "state":
            add_nonfinite(x, self._nonfinite, row, mask)
            if is_split(x, self._given, self._copies):
                self._tally.split.add(row)

    def gradient(
        self, x: Tensor, place: str, row: int, streams: bool = False, known: Tensor | None = None
    ) -> None:
        sums = self._backward[place].rows[row]
        if torch.compiler.is_compiling():
            if x.requires_grad:
                mask = where_known(fitting(self.mask, x), known, x)
                tap_gradient_in_graph(x, sums, mask, streams, self._names[place][row])
            return
        metrics = self._tally.metrics_of(place, "grad_rms")
        with self._faults.guard(*metrics):
            mask = where_known(fitting(self.passes.now.mask, x), known, x)
            if not self.recomputing or self.gradients.owes(place, row):
                self.gradients.tap(x, sums, mask, self.passes, (place, row), metrics, streams)

    def tap_embedding(self, x: Tensor, streams: bool = False, turned: bool = False) -> None:
        """The embedding; of `streams` [B, T, n, D] alike the first, `turned` where the others have tokens first."""
        # Where a stack is run through several times, only the first time starts at the embedding.
        if torch.compiler.is_compiling():
            # Nothing may be noted down inside a compiled checkpoint: `_ran_again` sees to it later.
            self._calls[0].add_(1)
            self.tap(x, "output", 0, streams, turned)
        elif not self._embedded and not self.recomputing:
            self._embedded = True
            self.tap(x, "output", 0, streams, turned)
        elif self.recomputing and self.gradients.owes("output", 0):
            self.tap(x, "output", 0, streams, turned)
