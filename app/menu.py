"""The menu: links to the pages that carry the view along, so that the address has it at once, in a new tab too."""

from collections.abc import Sequence

import streamlit as st

from app import view

_PLACE, _PAGES = "menu", "menu's pages"


def place(pages: Sequence) -> None:
    """Where the links to each `st.Page` stand; `show` draws them."""
    st.session_state[_PLACE], st.session_state[_PAGES] = st.container(), pages


def show() -> None:
    """Draw the links with the view as it is now. Call in the page's fragment, in every run of it: the view changes there."""
    params = view.current().params()
    with st.session_state[_PLACE]:
        for page in st.session_state[_PAGES]:
            st.page_link(page, query_params=params, width="stretch")
