"""What following a forward says: the stream, what is added to it, and who receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from probes.recipes import Recipe


@dataclass(frozen=True)
class Call:
    """One call of a child, `name` below the traced module; `key` and `keyword` say which argument carried the tensor
    (position or name), or `key` which element of its output it is."""

    name: str
    module: nn.Module
    key: int = 0
    keyword: str | None = None


@dataclass(frozen=True)
class Term:
    """What one layer adds to the stream.

    `calls` made it, first to last, with `parameters` used beside them. `state` is the call that receives the state it
    is made from (None: no call does, or it is the traced module's own input), which sums the input and the first
    `given` terms. `tail` is the call whose output is added as it is; None when something comes between, as a gate does.
    `after` is a call that receives the stream with this term just added. `begins`: the state is the module's own input;
    `changed`: that input was scaled or normed on the way to it; `sums`: it is the state before plus the term before;
    `scaled`: the stream is scaled or normed between the state and where the term is added, so that it gains something else. `state_made` and `made` say how the state and the term come from
    what is seen, where no call shows them (None: in no way that is known).
    """

    calls: tuple[Call, ...]
    parameters: tuple[nn.Parameter, ...]
    state: Call | None
    given: int
    tail: Call | None
    after: Call | None
    begins: bool = False
    changed: bool = False
    sums: bool = False
    state_made: Recipe | None = None
    made: Recipe | None = None
    scaled: bool = False


@dataclass(frozen=True)
class Flow:
    """The stream through one forward: the name of the argument that carries it, what is added in order, and what else
    happens to it (`change`, empty for a plain sum). `norm` is a last call that only normalises what is handed on. Of
    several results the stream is number `result`. `start` is a call that returns the stream as
    it begins within a module, `end` one that is given it when all is added."""

    argument: str
    terms: tuple[Term, ...]
    change: str
    norm: Call | None
    result: int = 0
    start: Call | None = None
    end: Call | None = None
    ends: bool = True  # what is returned has been scaled or normed no further than the last term's sum
