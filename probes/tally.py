"""The sums of one recorded step, on the device where the model is, and the metrics they make."""

from math import nan

import torch
from torch import Tensor

from probes.declared import out_of_order
from probes.edges import EdgeSums
from probes.expert_taps import EXPERT_METRICS, Loads, most
from probes.identity import identity_error, tolerance_of
from probes.passes import Passes
from probes.read_errors import ReadErrors
from probes.rows import block_rows, edge_sources, last_layers
from probes.sample import Sample
from probes.sites import Sites
from probes.statistics import DEPTH_METRICS, Tables

METRIC_OF = {"state": "hidden", "output": "output", "block": "block"}
ACTIVATIONS = tuple(f"{name}_{suffix}" for name in METRIC_OF.values() for suffix in ("rms", "grad_rms"))


class Tally:
    """Taps write to the `live` tables; `passes` adds what counts to those of the step."""

    def __init__(self, sites: Sites, device: torch.device, share: int = 1):
        self.device = device
        self._block_rows = block_rows(sites, device)
        rows = len(sites.layers) + 1
        # What the final norm is given after the blocks has a row beside that of what leaves them.
        self._rows, self._receives = rows, sites.receiver is not None
        states = rows + self._receives
        sizes = {"state": states, "output": rows}
        if self._block_rows is None:
            sizes["block"] = len(last_layers(sites))
        edges, exists = edge_sources(sites), torch.from_numpy(sites.layout.triangle())
        self.live, self._counted = (
            Tables(
                sizes,
                sites.depth_sources,
                device,
                most(sites.experts),
                EdgeSums(edges, exists, device) if edges else None,
                len(sites.layers),
            )
            for _ in range(2)
        )
        self._loads = Loads(sites.experts, device)
        self._is_sum, self._named = sites.is_plain, len(sites.layers) if sites.named else 0
        self.errors = ReadErrors(sites.depth_sources, device) if sites.found is not None else None
        self.sample = Sample(states, device, share)
        self.lost_final = False
        """Whether the final state is made of what leaves the last transformer block and more, and is seen nowhere."""
        self.split: set[int] = set()
        """States of which this process sees a part of what others see too (sequence parallelism)."""
        self.torn: set[tuple[str, int]] = set()
        """Rows of gradients that are seen but in part (torn.py)."""
        self.given = torch.tensor([*(site.given for site in sites.layers), rows], device=device)
        """How many sources each state sums: all before it, but for layers side by side."""
        self.calls = torch.zeros(2, dtype=torch.int64, device=device)
        """How often the embedding and the final norm were seen in compiled forwards."""
        self.passes = Passes(self.live, self._counted)

    @property
    def counted(self) -> Tables:
        """The sums of the forwards that count."""
        return self._counted

    @property
    def nbytes(self) -> int:
        """Memory held on the device, in bytes."""
        tensors = (*self.live.tensors(), *self._counted.tensors(), *self.sample.tensors())
        return sum(tensor.nbytes for tensor in tensors)

    def metrics_of(self, place: str, suffix: str) -> list[str]:
        """Names of the metrics that are made from the rows of a place."""
        places = [place, "block"] if self._block_rows and self._block_rows[0] == place else [place]
        return [f"{METRIC_OF[p]}_{suffix}" for p in places]

    def reset(self) -> None:
        """A new step begins."""
        self.calls.zero_()
        if self.errors is not None:
            self.errors.reset()
        self.passes.reset()

    def settle(self) -> None:
        """The step is complete, and its sums are."""
        self.passes.settle()
        for place, row in self.torn:
            self._counted.backward[place].rows[row].zero_()

    def finish(self, matrices: bool) -> dict[str, Tensor]:
        """Metrics of the step just taken, float32 on the device, by name of the vocabulary."""
        self.settle()
        metrics = {}
        for suffix, table in (("rms", self._counted.forward), ("grad_rms", self._counted.backward)):
            done = {place: moments.finish() for place, moments in table.items()}
            metrics[f"hidden_{suffix}"] = self._states(done["state"], torch.nan)
            metrics[f"output_{suffix}"] = done["output"]
            metrics[f"output_{suffix}"][0].masked_fill_(self._ran_again(), torch.nan)
            if self._block_rows is None:
                metrics[f"block_{suffix}"] = done["block"]
            else:
                place, rows = self._block_rows
                metrics[f"block_{suffix}"] = done[place][rows]
        if matrices:
            metrics["identity_error"] = self._identity_error()
            count = self._counted.forward["state"].count
            nonfinite = self._counted.nonfinite.float().where(count > 0, torch.nan)
            metrics["nonfinite"] = self._states(nonfinite, torch.nan)
            if self._counted.experts is not None:
                metrics |= self._loads.finish(self._counted.experts)[0]
            if self._counted.depth is not None:
                metrics |= self._counted.depth.finish()
            if self._counted.edges is not None:
                metrics["depth_attribution"] = self._counted.edges.finish(self._edges_seen() > 0)
            if self.errors is not None:
                metrics = self.errors.blanked(metrics, self._counted.depth.tokens)
        return metrics

    def sums(self, matrices: bool) -> list[Tensor]:
        """What adds up over micro-batches and over processes: that of vectors, or that of matrices alone."""
        counted = self._counted
        if matrices:
            depth = counted.depth.tensors() if counted.depth is not None else []
            edges = counted.edges.tensors() if counted.edges is not None else []
            return [
                counted.nonfinite,
                *depth,
                *edges,
                *([] if counted.experts is None else [counted.experts]),
            ]
        alone = {id(tensor) for tensor in self.sums(True)}
        return [*(tensor for tensor in counted.tensors() if id(tensor) not in alone), self.calls]

    def sampled(self) -> dict[str, Tensor]:
        """The sample, by name."""
        states, outputs, about = self._sampled()
        return {"states": states, "outputs": outputs, "about": about.masked_fill(self._mixed_up(), 0)}

    def _sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        sample = self.sample
        about = torch.stack([self._states(sample.about[0], 0), sample.about[1, : self._rows]])
        return self._states(sample.state, torch.nan), sample.output[: self._rows], about

    def _states(self, rows: Tensor, blank: float) -> Tensor:
        """[L+1, ...] of rows of the table of states: the final state is what the final norm was given, if that was as many
        elements as had left the blocks."""
        if self.lost_final:
            rows = rows.clone()
            rows[self._rows - 1] = blank
        if not self._receives:
            return rows
        left, given = self._counted.forward["state"].count[-2:]
        final = rows[-1].where(left == given, rows[-2])
        return torch.cat([rows[:-2], final[None]])

    def counts(self, matrices: bool) -> dict[str, Tensor]:
        """How much each row of the metrics of `finish` has seen, by name; zero for a row that saw nothing."""
        counts = {}
        for suffix, table in (("rms", self._counted.forward), ("grad_rms", self._counted.backward)):
            counts[f"hidden_{suffix}"] = self._states(table["state"].count, 0)
            counts[f"output_{suffix}"] = table["output"].count.clone()
            counts[f"output_{suffix}"][0].masked_fill_(self._ran_again(), 0)
            place, rows = self._block_rows or ("block", slice(None))
            counts[f"block_{suffix}"] = table[place].count[rows]
        if matrices:
            counts["nonfinite"] = counts["hidden_rms"]
            if self._counted.experts is not None:
                assigned = self._loads.finish(self._counted.experts)[1]
                counts |= dict.fromkeys(EXPERT_METRICS, assigned)
            if self._counted.depth is not None:
                counts |= dict.fromkeys(DEPTH_METRICS, self._counted.depth.tokens)
            if self._counted.edges is not None:
                counts["depth_attribution"] = self._edges_seen()
            if self.errors is not None:
                counts["read_error"] = self._counted.depth.tokens
        return counts

    def _edges_seen(self) -> Tensor:
        """Tokens of each read, [R]. That a state takes its sources as they are is known where all states are their
        sums."""
        count = self._counted.edges.count
        if not self._is_sum:
            return count
        errors = self._identity_error()
        known = ~errors.isnan() & ~(errors > tolerance_of(self.sample.about)).any()
        return count.where(known, 0)

    def _identity_error(self) -> Tensor:
        states, outputs, _ = self._sampled()
        return identity_error(states, outputs, self.given).masked_fill(self._mixed_up(), torch.nan)

    def _mixed_up(self) -> Tensor:
        """Whether the sample has the states of one run and the outputs of another, or states of other layers; bool [] on
        the device."""
        return self._ran_again() | (bool(self.passes.repeated) or self.misplaced is not None)

    @property
    def misplaced(self) -> int | None:
        """Of layers that the user named, the first row of a state that cannot be that of its layer."""
        if not self._named:
            return None
        at = {key: float(moment) for moment, key in enumerate(self.passes.met)}
        states = [at.get(("state", row), nan) for row in range(self._named + 1)]
        return out_of_order(states, [at.get(("output", row + 1), nan) for row in range(self._named)])

    def _ran_again(self) -> Tensor:
        """Whether compiled layers ran several times in one forward, so that the embedding's row holds later states
        too; bool [] on the device."""
        first, last = self.calls
        return (first > last) & (last > 0)
