"""The view: which runs, which step, which measure. It lives in the URL, so a link reopens what was seen.

The view is the one truth: pickers show it and change it, nothing else remembers anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import streamlit as st

_VIEW, _WRITTEN = "view", "view written"


@dataclass(frozen=True)
class View:
    """What is looked at. Every field has its query parameter; defaults stay out of the URL.

    No runs means the newest of each residual; no step means the latest, also while a run grows. `focus` names the run of which a
    read (from 1) and a source (from 0) are looked at closely.
    """

    runs: tuple[str, ...] = ()
    step: int | None = None
    scalar: str = "loss"
    along: str = "step"
    smooth: str = "auto"
    curve_scale: str = "linear"
    search: str = ""
    settings: str = "differing"
    depth: str = "hidden_rms"
    depth_scale: str = "linear"
    gradient: str = "output_grad_rms"
    gradient_scale: str = "log"
    show: str = "depth_weight"
    reads: str = "all"
    pair: tuple[str, ...] = ()
    focus: str = ""
    read: int | None = None
    source: int | None = None
    first: str = ""
    second: str = ""
    by: str = "loss"
    compared: str = "hidden_rms"
    compare_scale: str = "linear"
    matrix: str = "depth_weight"
    other: int | None = None
    sequence: int | None = None
    token: int | None = None
    caused: str = ""
    attribution: str = ""
    cause: str = "ablation"
    cause_layers: str = "removal"
    cause_read: int | None = None

    @classmethod
    def parse(cls, params: Mapping[str, Sequence[str]]) -> "View":
        """The view a query string describes; what it does not say, or says badly, is left at its default."""
        found = {}
        for field in fields(cls):
            values = [value for value in params.get(field.name, ()) if value]
            if not values:
                continue
            if field.name in ("runs", "pair"):
                found[field.name] = tuple(dict.fromkeys(values))
            elif field.default is None:
                if values[-1].isascii() and values[-1].isdecimal():
                    found[field.name] = int(values[-1])
            else:
                found[field.name] = values[-1]
        return cls(**found)

    def params(self) -> dict[str, list[str]]:
        """The query parameters of this view."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else [str(value)]
        return found


def arrive() -> None:
    """Call first in every full run of the script: take a link's view, put ours back after a page change."""
    params = {name: st.query_params.get_all(name) for name in st.query_params}
    state = st.session_state
    # A query string we wrote ourselves may arrive late, after a newer change: it is not a new link.
    if _VIEW not in state or (params and View.parse(params) not in state[_WRITTEN]):
        state[_VIEW], state[_WRITTEN] = View.parse(params), set()
    _write(state[_VIEW])


def current() -> View:
    return st.session_state[_VIEW]


def change(**parts) -> None:
    """Keep what was picked, here and in the URL."""
    before = current()
    after = replace(before, **parts)
    if after != before:
        st.session_state[_VIEW] = after
        _write(after)


def _write(view: View) -> None:
    st.session_state[_WRITTEN].add(view)
    wanted = view.params()
    if {name: st.query_params.get_all(name) for name in st.query_params} != wanted:
        st.query_params.from_dict(wanted)
