"""Which rows of the metrics come from where, by the sites of a model."""

import torch
from torch import Tensor, nn

from probes.sites import Sites


def last_layers(sites: Sites) -> list[int]:
    """Index of the last layer of each transformer block."""
    return list({site.layer.block: site.layer.index for site in sites.layers}.values())


def reads_after_blocks(sites: Sites) -> list[nn.Module]:
    return [sites.reads[layer] for layer in last_layers(sites)]


def block_rows(sites: Sites, device: torch.device) -> tuple[str, Tensor] | None:
    """Where block_rms is found among the other rows: a plain residual's is the next state, Full AttnRes' the
    output of the last layer. None for Block AttnRes, whose partial sums need taps of their own."""
    # On the device, for indexing with a list copies the list there and waits for it.
    last = torch.tensor(last_layers(sites), device=device)
    if not sites.has_reads:
        return "state", last
    if len(sites.layout.sources) == len(sites.layers) + 1:
        return "output", last
    return None


def rows_by_arithmetic(sites: Sites) -> tuple[set[int], set[int]]:
    """Rows of states that are summed from the state and the output before, and of those kept for a sum or difference."""
    if sites.found is not None:
        return set(), set()  # no state is the one before plus an output
    before = [None, *sites.layers]
    summed = {
        row
        for row, site in enumerate(sites.layers)
        if site.state is None
        and site.state_made is None
        and site.sums
        and before[row] is not None
        and before[row].output is not None
    }
    differences = {
        row for row, site in enumerate(sites.layers) if site.output is None and site.after is not None
    }
    return summed, {row - 1 for row in summed} | differences


def unhooked_rows(sites: Sites) -> dict[str, set[int]]:
    """Rows that no hook sees, by place: those that marks may fill."""
    summed, _ = rows_by_arithmetic(sites)
    states = {
        row
        for row, site in enumerate(sites.layers)
        if site.state is None and site.state_made is None and row not in summed
    }
    outputs = {
        row
        for row, site in enumerate(sites.layers, 1)
        if site.output is None and site.after is None and site.output_made is None
    }
    if sites.final is None:
        states.add(len(sites.layers))
    if 0 in states and not sites.has_reads:
        outputs.add(0)
    reads = set(range(len(sites.layers) + 1)) if sites.is_marked else set()
    return {"state": states, "output": outputs, "read": reads}


def edge_sources(sites: Sites) -> list[int]:
    """How many sources each read or branch takes, where depth edges can be told; else nothing."""
    if sites.has_reads:
        return sites.depth_sources
    if sites.is_plain and not sites.is_marked and not sites.staged:  # other stages hold the sources
        return [*(site.given for site in sites.layers), len(sites.layers) + 1]
    return []
