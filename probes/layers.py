"""The layers of one forward that was followed: where each one's state and output are seen, its name and its kind."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from probes.flow import Call, Flow, Term
from probes.layout import Layer
from probes.nodes import has_matrix
from probes.recipes import Given, Recipe
from probes.sites import LayerSite, Made, Place
from probes.symbols import reseed, undisturbed

_ATTENTION = (
    "attn",
    "attention",
    "ssm",
    "mamba",
    "retention",
    "recurrent",
    "conv",
    "delta",
)
_MLP = (
    "mlp",
    "ffn",
    "ff",
    "feed_forward",
    "feedforward",
    "moe",
    "expert",
    "dense",
    "fc",
    "linear",
    "intermediate",
)


def layers_of(
    path: str,
    module: nn.Module,
    flow: Flow,
    before: int,
    block_of: Callable[[Term], int],
    within: bool = False,
) -> Iterator[LayerSite]:
    """The layers of one flow, after `before` earlier ones. `within` a module, the stream is not its argument."""
    entry = place_in(path, flow.start, is_input=False) if flow.start is not None else None
    if not within:
        entry = Place(path, module, is_input=True, keyword=flow.argument)
    end = None if within or flow.norm else Place(path, module, is_input=False, key=flow.result)
    last: LayerSite | None = None
    for index, term in enumerate(flow.terms):
        state = place_in(path, term.state, is_input=True) if term.state else (entry if term.begins else None)
        output = place_in(path, term.tail, is_input=False) if term.tail is not None else None
        sums = index == 0 or (term.sums and last.output is not None)
        state_made = (
            made_in(path, module, term.state_made) if state is None and not (index and sums) else None
        )
        after = None
        if output is None and term.given == index and not term.scaled and (state or state_made or sums):
            is_last = index + 1 == len(flow.terms) and flow.ends
            after = place_in(path, term.after, is_input=True) if term.after else (end if is_last else None)
        output_made = made_in(path, module, term.made) if output is None and after is None else None
        names = _sublayer(term)
        layer = Layer(before + index + 1, kind_of(names), block_of(term), named(path, names))
        modules = tuple(call.module for call in term.calls)
        last = LayerSite(
            layer, state, output, after, before + term.given + 1, modules, term.parameters, sums, state_made, output_made
        )  # fmt: skip
        yield last


def made_in(path: str, module: nn.Module, recipe: Recipe | None) -> Made | None:
    """A recipe of the forward of `module` as one of the model."""
    if recipe is None:
        return None
    leaves = [_seen_at(path, module, leaf) for leaf in recipe.leaves]
    held = [(*name.rpartition("."), part) for name, part in recipe.held]
    return Made(
        recipe.run,
        tuple(leaves),
        tuple((module.get_submodule(within), key, part) for within, _, key, part in held),
    )


def _seen_at(path: str, module: nn.Module, leaf: tuple[int, str] | Call | Given) -> Place:
    if isinstance(leaf, Given):
        return place_in(path, leaf.call, is_input=True)
    if isinstance(leaf, Call):
        return place_in(path, leaf, is_input=False)
    return Place(path, module, is_input=True, key=leaf[0], keyword=leaf[1])


def place_in(path: str, call: Call, is_input: bool) -> Place:
    name = f"{path}.{call.name}" if path else call.name
    return Place(name, call.module, is_input, call.key, call.keyword)


def _sublayer(term: Term) -> list[Call]:
    """The calls that do a layer's work: those with matrices, downstream of where the state comes in."""
    names = [call.name for call in term.calls]
    start = names.index(term.state.name) if term.state is not None else 0
    return working(term.calls[start:]) or list(term.calls)


def working(calls: Sequence[Call]) -> list[Call]:
    """Those with matrices."""
    return [call for call in calls if has_matrix(call.module)]


def named(path: str, calls: Sequence[Call]) -> str:
    names = [call.name for call in calls]
    first = f"{path}.{names[0]}" if path else names[0]
    return " + ".join([first, *(name.rpartition(".")[2] for name in names[1:])])


def kind_by_name(name: str) -> str | None:
    """ "attention" or "mlp", where a module's name says it."""
    words = {"attention": _ATTENTION, "mlp": _MLP}
    return next((kind for kind, parts in words.items() if any(part in name.lower() for part in parts)), None)


def kind_of(calls: Sequence[Call]) -> str:
    """ "attention" for a layer that mixes tokens, "mlp" for one that does not: by name where that says it, otherwise by
    trying; "layer" where neither tells."""
    by_name = kind_by_name(" ".join(call.name for call in calls))
    if by_name is not None or len(calls) > 1:
        return by_name or "layer"
    return {True: "attention", False: "mlp", None: "layer"}[_mixes_tokens(calls[0].module)]


def _mixes_tokens(module: nn.Module) -> bool | None:
    """Whether one token's output depends on another token; None for a module that needs more than a state."""
    matrix = next(parameter for parameter in module.parameters() if parameter.ndim > 1)
    with undisturbed(set(module.modules())):
        reseed(matrix.device)
        state = torch.randn(1, 4, matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        other = state.clone()
        other[:, 0] = torch.randn_like(other[:, 0])  # another one: a norm takes a mere shift away
        # The same random numbers for both, or dropout would look like a change.
        try:
            one, two = (_first(_seeded(module, x)) for x in (state, other))
            if not one.any():
                return None  # an output that begins at zero tells nothing
            # Rows of one product may differ in their last bits by where they stand.
            return not torch.allclose(one[:, 1:], two[:, 1:], rtol=1e-3, atol=1e-6)
        except Exception:  # it needs more than a state, in whatever way it says so
            return None


def _seeded(module: nn.Module, x: torch.Tensor) -> object:
    reseed(x.device)
    return module.forward(x)


def _first(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple | list) else result
