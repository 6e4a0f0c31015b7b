"""What the autograd graph of a forward says about tensors that no module is given or returns."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import Tensor


def mixed_on_its_way(x: Tensor, others: Iterable[object], output: object) -> bool:
    """Whether `x` is mixed with tensors of other graph nodes into one of its own size, on its way into the tensors of
    `output`. Where they come together as losses do, they are not. False too where there is no graph."""
    target, size, others = x.grad_fn, x.numel(), set(others) - {x.grad_fn}
    made_of: dict = {}  # by node: whether of the target, and whether of others but by way of the target
    waiting = [each.grad_fn for each in _tensors(output) if each.grad_fn is not None]
    while waiting and target is not None:
        node = waiting[-1]
        ends = node is target or node in others
        before = [] if ends else [each for each, _ in node.next_functions if each is not None]
        if unknown := [each for each in before if each not in made_of]:
            waiting += unknown
            continue
        waiting.pop()
        of_target = node is target or any(made_of[each][0] for each in before)
        of_others = node in others or any(made_of[each][1] for each in before)
        if of_target and of_others and any(prod(each.shape) == size for each in node._input_metadata):
            return True
        made_of[node] = of_target, of_others
    return False


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _tensors(each)
    elif hasattr(tree, "__dataclass_fields__"):
        for each in vars(tree).values():
            yield from _tensors(each)
