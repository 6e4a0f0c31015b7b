"""Layers that the user names, in the order in which the model runs them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from probes import trial
from probes.dataflow import follow
from probes.layers import kind_by_name
from probes.layout import Layer
from probes.manifest import RunError
from probes.names import matching
from probes.sites import LayerSite, Place
from probes.stacks import Stack, entry_of
from probes.symbols import Untraceable, undisturbed

Modules = dict[str, nn.Module]


def declared(root: nn.Module, layers: str | Sequence[str], norms: str | Sequence[str]) -> Stack:
    """The sublayers that match `layers`, and the modules that match `norms` as what receives their states and the final
    one. Modules are often registered in another order than they run in, so one forward is tried where that is possible.

    Raises RunError where the numbers do not fit, or where a state is received after its layer has run.
    """
    sublayers, receivers = matching(root, layers, "layers"), matching(root, norms, "norms")
    if len(receivers) != len(sublayers) + 1:
        raise RunError(
            f"layers= matches {len(sublayers)} modules and norms= {len(receivers)}: expected one norm for each layer "
            "and the final norm, in order."
        )
    tried = _Trial(root, sublayers, receivers)
    sublayers, receivers = tried.in_order()
    states = [Place(name, module, is_input=True) for name, module in receivers.items()]
    groups = list(dict.fromkeys(_group(name) for name in sublayers))
    sites = [
        LayerSite(
            Layer(index, kind_by_name(name) or "mlp", groups.index(_group(name)) + 1, name),
            state,
            Place(name, module, is_input=False),
            None,
            index,
            (module, state.module),
        )
        for index, ((name, module), state) in enumerate(zip(sublayers.items(), states, strict=False), 1)
    ]
    return Stack("", len(groups), tuple(sites), states[-1], entry=tried.entry(groups[0], states[0]))


def out_of_order(states: Sequence[float], outputs: Sequence[float]) -> int | None:
    """The first row of a state that cannot be that of its layer, by when in a forward states 0..L were received and the
    outputs of layers 1..L returned (NaN: not at all); None where all can."""
    for row, (state, output) in enumerate(zip(states, outputs, strict=False)):
        if state > output or any(state > later for later in states[row:]):
            return row
        if any(output > later for later in outputs[row:]):
            return row
    return len(outputs) if any(output > states[-1] for output in outputs) else None


class _Trial:
    """One forward of `root`, if one can be tried: when sublayers return in it and receivers are called, and with what."""

    def __init__(self, root: nn.Module, sublayers: Modules, receivers: Modules):
        self._root, self._sublayers, self._receivers = root, sublayers, receivers
        self._returned: dict[str, int] = {}
        self._called: dict[str, int] = {}
        self._given: dict[nn.Module, tuple[tuple, dict]] = {}
        if not any(p.is_meta or hasattr(p, "to_local") for p in root.parameters()):
            self._try()

    def in_order(self) -> tuple[Modules, Modules]:
        """Sublayers and receivers in the order in which they run; as they are where that was not seen of all."""
        sublayers, receivers = self._sublayers, self._receivers
        if set(self._returned) != set(sublayers) or set(self._called) != set(receivers):
            return sublayers, receivers
        sublayers = {name: sublayers[name] for name in sorted(sublayers, key=self._returned.get)}
        receivers = {name: receivers[name] for name in sorted(receivers, key=self._called.get)}
        called, returned = map(self._called.get, receivers), map(self._returned.get, sublayers)
        row = out_of_order(list(called), list(returned))
        if row is not None:
            state, layer = list(receivers)[row], [*sublayers, None][row]
            wrong = "receive the final state, but runs before the last of the layers"
            if layer is not None:
                wrong = f"receive the state of the layer {layer!r}, but runs after it"
            raise RunError(
                f"norms={state!r} should {wrong}: name for each layer a module that is given what the layer reads, and "
                "last one that is given the final state."
            )
        return sublayers, receivers

    def entry(self, group: str, first: Place) -> Place | None:
        """Where the first transformer block is given the embedding, if that is not what its first layer reads, as in
        blocks that mix streams."""
        block = self._root.get_submodule(group)
        if block in self._given and first.module in self._given and block is not first.module:
            state = first.given(*self._given[first.module])
            return _other(Place(group, block, is_input=True), *self._given[block], state)
        try:
            follow(block)
        except Untraceable:
            return entry_of(group, block)
        return None

    @torch.no_grad()
    def _try(self) -> None:
        blocks = {self._root.get_submodule(_group(name)) for name in self._sublayers}
        handles = [
            *(m.register_forward_hook(partial(self._returns, name)) for name, m in self._sublayers.items()),
            *(m.register_forward_pre_hook(partial(self._calls, name)) for name, m in self._receivers.items()),
            *(
                m.register_forward_pre_hook(self._gives, with_kwargs=True)
                for m in blocks | set(self._receivers.values())
            ),
        ]
        modes = {module: module.training for module in self._root.modules()}
        try:
            with undisturbed(set(modes)), torch.compiler.set_stance("force_eager"):
                self._root.train()
                for args, kwargs in trial.inputs(self._root):
                    for seen in (self._returned, self._called, self._given):
                        seen.clear()
                    with suppress(Exception):  # it takes other things, in whatever way it says so
                        self._root(*args, **kwargs)
                        return
            self._given.clear()
        finally:
            for module, mode in modes.items():
                module.training = mode
            for handle in handles:
                handle.remove()

    def _returns(self, name: str, *_) -> None:
        self._returned.setdefault(name, len(self._returned) + len(self._called))

    def _calls(self, name: str, *_) -> None:
        self._called.setdefault(name, len(self._returned) + len(self._called))

    def _gives(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._given.setdefault(module, (args, kwargs))


def _other(place: Place, args: tuple, kwargs: dict, state: object) -> Place | None:
    """Which of the arguments at `place` is the stream, [B, T, D] or [B, T, n, D]; None where it is just the `state`, or
    none fits."""
    for key, x in [*enumerate(args), *kwargs.items()]:
        if (
            not isinstance(x, Tensor)
            or not isinstance(state, Tensor)
            or not x.is_floating_point()
            or x.ndim < 3
        ):
            continue
        if (x.shape[:2], x.shape[-1]) == (state.shape[:2], state.shape[-1]):
            same = x.shape == state.shape and torch.equal(x, state)
            where = {"key": key} if isinstance(key, int) else {"keyword": key}
            return None if same else replace(place, **where)
    return None


def _group(name: str) -> str:
    """The part of a name that says which transformer block it is: up to its first number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
