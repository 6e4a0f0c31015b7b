"""Carry the sources of AttnRes through a model that knows nothing of them.

A block's own code adds its layers' outputs to the state that it is given. So it is given the running sum of the depth
block, or zeros where a depth block begins, and what it adds up *is* the partial sum, whatever gates, multipliers or
dropout it applies on the way. Where a depth block ends inside it, its layers' outputs are widened to a stack of
*slots*, one for each depth block it writes to, zero in all but their own.

What belongs to one forward pass, the finished sources, rides as an attribute on the state's tensor, and is never
changed: whoever runs a block again on that tensor, as checkpointing does, finds the sources of the same pass.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from attnres.depth import Depth
from attnres.plans import Plan, plans_of, this_thread
from attnres.trying import first_tensor, with_first
from attnres.watching import WatchedBlock

LOST = (
    "{} was given a state without its sources. Either it runs under reentrant checkpointing (use "
    'gradient_checkpointing_kwargs={{"use_reentrant": False}}), or it was called by itself, or a block before it was left '
    "out or exchanged, or something between the transformer blocks made a new tensor of the state."
)
LEFT_OUT = (
    "{} was left out of this forward pass or exchanged after the conversion, and an AttnRes model needs every block that "
    "was converted, in every pass: set the model's layerdrop to 0, and exchange blocks before attnres.convert."
)
EXCHANGED = (
    "{} was exchanged after the conversion, and the new module does not know of AttnRes: keep model.attnres.state_dict(), "
    "attnres.revert the model, exchange the module, attnres.convert again, and load the reads' state dict."
)
UNTRIED = (
    "{} did not run on the example that the model was converted on, and does in this pass, so nothing is known of what it "
    "adds to the stream: attnres.revert the model, and convert it with an example on which that part runs."
)
REENTRANT = (
    "{} runs with gradients off in a forward that has them, or with gradients on after blocks that had none, as under "
    "reentrant checkpointing or no_grad around some blocks, and gradients of sources and queries would be lost. Use "
    'gradient_checkpointing_kwargs={{"use_reentrant": False}}, and requires_grad_(False) for what is not to be trained.'
)


# FSDP2's, before each module that it shards: the state comes out of it as another tensor on the same memory.
RENEWING = "RegisterPostBackwardFunctionBackward"


def depth_of(state: Tensor, name: str) -> Depth:
    """The sources that ride on a state; RuntimeError where there are none."""
    depth = getattr(state, "attnres_depth", None)
    if depth is None and type(state.grad_fn).__name__ == RENEWING:
        handed = getattr(state.untyped_storage(), "attnres_handed", lambda: None)()
        if handed is not None and handed.shape == state.shape:
            depth, written = handed.attnres_depth, handed.attnres_written
            state.attnres_depth, state.attnres_written = depth, written
    if depth is None:
        raise RuntimeError(LOST.format(name))
    return depth


def hand_on(state: Tensor, depth: Depth, written: int) -> Tensor:
    """The state, with its sources, after so many layers."""
    state.attnres_depth, state.attnres_written = depth, written
    if (
        not torch.compiler.is_compiling()
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        # No more than a weak reference: the sources may lie in the same memory, which would then hold itself.
        state.untyped_storage().attnres_handed = weakref.ref(state)
    return state


# Hooks are objects, not closures: copying a model copies them with what they hold.


class Opened:
    """Whether a pass has begun, and not come to its end: the last block may be left out, and nothing comes after it."""

    def __init__(self, open_depth: Callable[[], Depth]):
        self.open_depth = open_depth
        self.threads: dict[int, bool] = {}
        """Those with an open pass."""

    def depth(self) -> Depth:
        """That of a new pass."""
        self.threads[this_thread()] = True
        return self.open_depth()

    def close(self) -> None:
        self.threads.pop(this_thread(), None)

    def is_open(self) -> bool:
        return this_thread() in self.threads


class Begin:
    """Before the module that holds the blocks: what a backward pass ran again, or an error left open, is done."""

    def __init__(self, opened: Opened):
        self.opened = opened

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.opened.close()


class End:
    """After the module that holds the blocks: the last of them has to have run, if the first has."""

    def __init__(self, opened: Opened, last: str):
        self.opened, self.last = opened, last

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.opened.is_open():
            raise RuntimeError(LEFT_OUT.format(self.last))


class Enter:
    """Before a transformer block: finish the depth block before it, where its first layer begins another."""

    def __init__(self, plan: Plan, opened: Opened, before: str):
        self.plan, self.opened = plan, opened
        self.before = before
        """The name of the block before."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        plan = self.plan
        for name, part in plan.parts.items():
            if getattr(module, name, None) is not part:
                raise RuntimeError(EXCHANGED.format(f"{plan.name}.{name}"))
        state = plan.state(args, kwargs)
        if plan.first == 0:
            depth = self.opened.depth()
        else:
            depth = depth_of(state, plan.name)
            if state.attnres_written != plan.first:
                raise RuntimeError(LEFT_OUT.format(self.before))
            # The embedding may be a leaf with a gradient where all gradients are off; what a block made may not.
            if not torch.is_grad_enabled() and state.requires_grad:
                raise RuntimeError(REENTRANT.format(plan.name))
        if plan.begins:
            depth = depth.commit([state], plan.first)
            carried = torch.zeros_like(state)
        else:
            carried = plan.widened(state, 0)
        carried.attnres_depth = depth
        plan.progress().begin(depth)
        return plan.replaced(args, kwargs, carried)


class Untried:
    """Before a child of a transformer block that did not run on the example."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, module: nn.Module, args: tuple) -> None:
        raise RuntimeError(UNTRIED.format(self.name))


class Read:
    """Before a norm: give it the mix of all sources instead of the sum."""

    def __init__(self, plan: Plan, index: int, name: str):
        self.plan, self.index, self.name = plan, index, name

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        plan, carried = self.plan, args[0]
        depth = self._depth(carried)
        if torch.is_grad_enabled() != depth.records:
            raise RuntimeError(REENTRANT.format(self.name))
        if plan.counts:
            plan.progress().calls[:] = [self.index]
        if self.index == 0 and plan.begins:
            return depth.read(plan.first, []), *args[1:]
        slots = [carried] if plan.slots == 1 else carried.unbind(0)
        written = 0 if self.index == 0 else plan.slot[self.index - 1]
        return depth.read(plan.first + self.index, slots[: written + 1]), *args[1:]

    def _depth(self, carried: Tensor) -> Depth:
        """The sources of the pass that this norm runs in, also when it runs again in backward."""
        plan, progress = self.plan, self.plan.progress()
        if torch.compiler.is_compiling():
            # The compiler traces a checkpointed block once, and lets it change nothing outside.
            plan.note_compiled()
            return progress.depth[0]
        if self.index == 0:
            # Those of Enter, but where the block's own code checkpoints itself.
            progress.begin(depth_of(carried, self.name))
        plan.check_read(progress.read, self.index)
        progress.read.append(self.index)
        depth = progress.depth[0]
        if self.index == plan.layers - 1:
            progress.depth.clear()
        return depth


class DepthOutput(nn.Identity):
    """Is called with the output of layer `depth_output` (from 1) before it becomes part of a stack: to see it there."""

    def __init__(self, depth_output: int):
        super().__init__()
        self.depth_output = depth_output


class Widen:
    """After a layer's last module: its output in the layer's slot."""

    def __init__(self, plan: Plan, index: int, output: DepthOutput):
        self.plan, self.index, self.output = plan, index, output

    def __call__(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        plain = self.output(first_tensor(output))
        return with_first(output, self.plan.widened(plain, self.plan.slot[self.index]))


class WidenEach:
    """The same for a module that is called several times in a block, as a dropout may be: it has to count."""

    def __init__(self, plan: Plan, calls: dict[int, int], outputs: Sequence[DepthOutput]):
        self.plan, self.outputs = plan, outputs
        self.calls = calls
        """For each layer that ends in this module, the call after the layer's norm that does."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        calls = self.plan.progress().calls
        layer, *seen = calls
        calls.append(module)
        if sum(other is module for other in seen) != self.calls.get(layer):
            return output
        plain = self.outputs[layer](first_tensor(output))
        return with_first(output, self.plan.widened(plain, self.plan.slot[layer]))


class Leave:
    """After a transformer block: hand on the partial sum; after the last one, the final state."""

    def __init__(self, plan: Plan, opened: Opened, is_last: bool):
        self.plan, self.opened, self.is_last = plan, opened, is_last

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple
    ) -> Tensor | tuple:
        plan = self.plan
        depth = depth_of(plan.state(args, kwargs), plan.name)
        written = plan.first + plan.layers
        progress = plan.progress()
        progress.depth.clear()
        if not torch.compiler.is_compiling():
            plan.check_read(progress.read, plan.layers)
        *finished, partial = first_tensor(output).unbind(0) if plan.slots > 1 else [first_tensor(output)]
        if self.is_last:
            self.opened.close()
            return with_first(output, depth.read(written, [*finished, partial]))
        if finished:
            depth = depth.commit(finished, written)
            # The compiler lets no attribute ride on one of several outputs of an operation.
            partial = partial.view_as(partial)
        return with_first(output, hand_on(partial, depth, written))


def attach(
    model: nn.Module,
    blocks: Sequence[WatchedBlock],
    layers_per_block: int,
    outputs: Sequence[DepthOutput],
    open_depth: Callable[[], Depth],
) -> list[torch.utils.hooks.RemovableHandle]:
    """Put the hooks of all blocks in place; the handles take them off again.

    `outputs` has one for each layer, `open_depth` begins the sources of a pass.
    """
    plans = plans_of(blocks, layers_per_block)
    opened, last = Opened(open_depth), blocks[-1]
    holder = _runner(model, blocks)
    handles = [
        holder.register_forward_pre_hook(Begin(opened)),
        holder.register_forward_hook(End(opened, last.name)),
    ]
    before = ""
    for block, plan in zip(blocks, plans, strict=True):
        handles.append(block.module.register_forward_pre_hook(Enter(plan, opened, before), with_kwargs=True))
        for index, layer in enumerate(block.layers):
            handles.append(layer.norm.register_forward_pre_hook(Read(plan, index, layer.name)))
        for name, child in block.module.named_children():
            if name in block.untried:
                handles.append(child.register_forward_pre_hook(Untried(f"{block.name}.{name}")))
        if plan.slots > 1:
            handles += _widen(block, plan, outputs[plan.first : plan.first + plan.layers])
        leave = Leave(plan, opened, is_last=block is last)
        handles.append(block.module.register_forward_hook(leave, with_kwargs=True))
        before = block.name
    return handles


def _runner(model: nn.Module, blocks: Sequence[WatchedBlock]) -> nn.Module:
    """The nearest module above all blocks that runs: lists and dicts of modules only hold others."""
    lists = [block.name.split(".")[:-1] for block in blocks]
    path = [names[0] for names in takewhile(lambda names: len({*names}) == 1, zip(*lists, strict=False))]
    if path == lists[0]:
        path = path[:-1]
    while path and type(model.get_submodule(".".join(path))).forward is nn.Module.forward:
        path = path[:-1]
    return model.get_submodule(".".join(path))


def _widen(
    block: WatchedBlock, plan: Plan, outputs: Sequence[DepthOutput]
) -> list[torch.utils.hooks.RemovableHandle]:
    """The hooks on the modules that end the block's layers."""
    if not plan.counts:
        ends = enumerate(zip(block.layers, outputs, strict=True))
        return [layer.tail.register_forward_hook(Widen(plan, index, out)) for index, (layer, out) in ends]
    calls: dict[nn.Module, dict[int, int]] = {}
    for index, layer in enumerate(block.layers):
        calls.setdefault(layer.tail, {})[index] = layer.tail_call
    return [tail.register_forward_hook(WidenEach(plan, each, outputs)) for tail, each in calls.items()]


def depth_outputs(layers: int) -> nn.ModuleList:
    """One for each layer."""
    return nn.ModuleList(DepthOutput(index + 1) for index in range(layers))
