"""The menu: links to the pages that carry the view along, so that the address has it at once, in a new tab too."""

from collections.abc import Sequence

import streamlit as st

from app import view

_SLOTS, _CARRIED = "menu", "menu carries"


def place(pages: Sequence) -> None:
    """Where the links stand, one for each `st.Page`; `follow` draws them."""
    st.session_state[_SLOTS] = [(page, st.empty()) for page in pages]
    st.session_state[_CARRIED] = None


def follow() -> None:
    """Let the links carry the view as it is now; call whenever it may have changed, in a fragment too."""
    params = view.current().params()
    if st.session_state[_CARRIED] == params:
        return
    st.session_state[_CARRIED] = params
    for page, slot in st.session_state[_SLOTS]:
        slot.page_link(page, query_params=params, width="stretch")
