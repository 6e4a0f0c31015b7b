"""What the probes would see in a model, as a table, before anything runs: `print(probes.describe(model))`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from probes import trial
from probes.finding import find_sites
from probes.identity import first_broken, tolerance
from probes.manifest import RunError
from probes.sites import LayerSite, Sites
from probes.taps import MATRICES, Taps
from probes.target import arguments, said
from probes.unchanged import unchanged
from probes.updates import Updates

_COLUMNS = ("layer", "kind", "transformer block", "module", "state seen at", "output seen at", "reads")


@dataclass(frozen=True)
class Description:
    """What was found in one model: `sites`; `errors`, the residual identity of each state (float32 [L+1], NaN where a
    source was not seen; None where no forward could be tried, `reason` says why); names of rows no tap saw."""

    model: str
    parameters: int
    sites: Sites
    probe_bytes: int
    model_bytes: int
    errors: np.ndarray | None
    first_broken: int | None
    unseen: tuple[str, ...]
    invented: bool
    reason: str = ""
    read_errors: np.ndarray | None = None  # of found reads, [R]; NaN where none was computed
    final: str = ""  # where the final state is seen, or why it is blank

    @property
    def holds(self) -> bool | None:
        """Whether every state was the embedding plus the outputs before it; None where some could not be checked."""
        if self.first_broken is not None:
            return False
        return None if self.errors is None or np.isnan(self.errors).any() else True

    def __str__(self) -> str:
        sites, layout = self.sites, self.sites.layout
        of_layer = [row.sources for row in layout.reads if row.layer is not None] if sites.has_reads else []
        counts = of_layer if len(of_layer) == len(sites.layers) else [""] * len(sites.layers)
        rows = [
            (
                str(site.layer.index),
                site.layer.kind,
                str(site.layer.block),
                site.layer.name,
                _state_route(sites, site),
                site.route,
                f"{count} sources" if count else "",
            )
            for site, count in zip(sites.layers, counts, strict=False)
        ]
        columns = _COLUMNS if any(counts) else _COLUMNS[:-1]
        head = (
            f"{self.model}: {self.parameters:,} parameters, {len(sites.layers)} layers in {layout.blocks} transformer "
            f"blocks"
        )
        return "\n".join([head, "", *_table(columns, rows), "", *self._reads(), *self._sentences()])

    def _reads(self) -> list[str]:
        """How each found read is seen, as a table."""
        if self.sites.found is None:
            return []
        errors = self.read_errors if self.read_errors is not None else [None] * len(self.sites.found.rows)
        rows = [
            (
                row.label,
                f"{row.sources}",
                read.route,
                "not checked" if error is None else _error(float(error)),
            )
            for row, read, error in zip(self.sites.found.rows, self.sites.found.reads, errors, strict=True)
        ]
        return [*_table(("read", "sources", "seen", "weights × sources against the state"), rows), ""]

    def _sentences(self) -> list[str]:
        sites = self.sites
        if sites.found is not None:
            reads = f"{len(sites.found.rows)} depth reads, found by running the model on a few tokens"
        elif sites.reads:
            reads = f"{len(sites.reads)} depth reads, one for each layer and the final read ({sites.reads[-1].depth_sources} sources)"
        else:
            reads = "none: no module says that it attends over depth"
            if sites.change:
                reads = f"none: the stream is {sites.change}, which no read weighs alone; what states are made of is in mixing_weight"
        share = self.probe_bytes / self.model_bytes
        return [
            f"final state  {self.final or self._final()}",
            f"reads        {reads}",
            f"sources      {len(sites.layers) + 1}: the embedding and the output of each layer",
            f"identity     {self._identity()}",
            *(f"odd          {note}" for note in (sites.found.notes if sites.found is not None else ())),
            *([f"not seen     {', '.join(self.unseen)}"] if self.unseen else []),
            *(
                ["no gradient  of what is made of other tensors: the model shows none"]
                if self._computes()
                else []
            ),
            f"memory       {self.probe_bytes / 2**20:.2f} MiB on the model's device ({_percent(share)} of its parameters)",
        ]

    def _final(self) -> str:
        """Where the final state is, if no module shows it."""
        if len(self.sites.layers) in self.sites.computed_states:
            return "made by its read"
        return "not seen" if self.sites.found is not None else "marked by the model"

    def _computes(self) -> bool:
        """Whether a state or an output is computed."""
        return bool(self.sites.computed_states or self.sites.computed_outputs)

    def _identity(self) -> str:
        where = "on invented inputs" if self.invented else "on the batch given"
        if self.errors is None:
            return f"not checked: {self.reason}"
        if self.sites.has_reads:
            return "not expected: each state is a depth read's mix"
        if self.sites.change:
            return f"not a plain residual: the stream is {self.sites.change}"
        if self.first_broken is not None:
            state = self.sites.layout.states[self.first_broken].replace("into", "state into")
            return (
                f"MIXED OTHERWISE: the {state} is not the embedding plus the outputs before it (it differs by "
                f"{self.errors[self.first_broken]:.1e}, {where})"
            )
        if np.isnan(self.errors).all():
            return f"not checked: no state was seen once with all its sources {where}"
        if np.isnan(self.errors).any():
            return f"holds as far as outputs were seen {where}"
        return (
            f"holds: every state is the embedding plus the outputs before it (to {np.max(self.errors):.0e}, {where})"
            f"{self._by_construction()}"
        )

    def _by_construction(self) -> str:
        differences = sum(site.output is None and site.after is not None for site in self.sites.layers)
        if not differences:
            return ""
        return f"; within transformer blocks by construction for {differences} layers, whose output is a difference"


def describe(
    model: nn.Module,
    batch: object = None,
    *,
    stack: str | Sequence[str] | None = None,
    layers: int | str | Sequence[str] | None = None,
    norms: str | Sequence[str] | None = None,
) -> Description:
    """The layers of `model`, where their states and outputs would be seen, and whether the stream adds up.

    One forward is tried in training mode, on `batch` (a tensor, a tuple of positional or a mapping of keyword
    arguments) or on invented inputs; the model is left as it was. `stack`, `layers` and `norms` are those of
    `probes.record`. Raises RunError as `record` does for the model, and for a batch on which its forward fails.
    """
    sites = find_sites(model, stack, layers, norms, example=batch)
    if any(parameter.is_meta for parameter in sites.root.parameters()):
        raise RunError(
            f"{type(sites.root).__name__} is on the meta device, without values: give it some first."
        )
    given = [arguments(batch)] if batch is not None else []
    taps = Taps(sites)
    try:
        with unchanged(sites.root, None):
            reason = _tried(sites.root, taps, given)
    finally:
        taps.detach()
    if reason and batch is not None:
        raise RunError(f"The forward of {type(sites.root).__name__} fails on this batch: {reason}.")
    metrics = {} if reason else {name: value.cpu().numpy() for name, value in taps.finish().items()}
    errors = metrics.get("identity_error")
    dtype = next(sites.root.parameters()).dtype
    return Description(
        model=type(sites.root).__name__,
        parameters=sum(p.numel() for p in sites.root.parameters()),
        sites=sites,
        probe_bytes=taps.nbytes + Updates(sites).nbytes,
        model_bytes=sum(p.nbytes for p in sites.root.parameters()),
        errors=errors,
        first_broken=first_broken(errors, tolerance(dtype)) if errors is not None else None,
        unseen=() if reason else tuple(_unseen(sites, taps)),
        invented=batch is None,
        read_errors=metrics.get("read_error"),
        final=f"blank: {taps.finals.reason}" if taps.finals.reason else str(taps.finals.place or ""),
        reason=reason and f"give a batch, as in describe(model, batch) ({reason})",
    )


def _error(error: float) -> str:
    return "not seen" if np.isnan(error) else f"differs by {error:.0e}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _state_route(sites: Sites, site: LayerSite) -> str:
    if site.state is not None or site.state_made is not None:
        return str(site.state or site.state_made)
    if site.layer.index - 1 in sites.computed_states:
        return "made by its read"
    if not site.sums or sites.found is not None:
        return "not seen"
    return "state + output before" if sites.final is not None else "marked by the model"


def _tried(root: nn.Module, taps: Taps, given: list[tuple[tuple, Mapping]]) -> str:
    """One forward that the taps see; empty, or why none worked."""
    reason = "it is not known what its forward takes"
    root.train()
    taps.mode = MATRICES
    for args, kwargs in given or trial.inputs(root):
        taps.reset()
        try:
            with torch.enable_grad():
                root(*args, **kwargs)
            return ""
        except Exception as error:
            reason = said(error)
    return reason


def _unseen(sites: Sites, taps: Taps) -> list[str]:
    counts, layout = taps.counts(), sites.layout
    labels = {"hidden_rms": layout.states, "output_rms": [f"output of {label}" for label in layout.outputs]}
    return [
        label
        for name, rows in labels.items()
        for label, count in zip(rows, counts[name].tolist(), strict=True)
        if not count
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [columns, *(row[: len(columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
