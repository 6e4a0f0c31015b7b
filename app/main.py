"""The dashboard's script: `streamlit run app/main.py -- FOLDER ...`, or `depthscope dash FOLDER ...`."""

import sys
from pathlib import Path

# Streamlit puts this folder on the path, not the one that holds it.
_ROOT = str(Path(__file__).resolve().parents[1])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

import streamlit as st  # noqa: E402

from app import browser, menu, room, view  # noqa: E402

ICON = str(Path(__file__).with_name("icon.svg"))
st.set_page_config(page_title="depthscope", page_icon=ICON, layout="wide")
st.logo(ICON, size="large")
# Streamlit's own margins take a third of a laptop screen; the player stays in sight of the charts it moves.
st.html(
    "<style>.stMainBlockContainer{padding:2.2rem 2.5rem 3rem} .stSidebar{width:260px !important}"
    "[data-testid=stLayoutWrapper]:has(> .st-key-player){position:sticky;bottom:0;top:3.4rem;z-index:90}"
    ".stPageLink a:focus-visible,.depthscope-chart:focus-visible{outline:2px solid #1f7a85;outline-offset:-2px}"
    ".st-key-player{padding:.3rem 0 .6rem}"
    "[data-testid='stBaseButton-tertiary'] p{text-align:left}"
    # In a narrow window charts stand below each other, and no control is cut off.
    "@media (max-width:1000px){.stMainBlockContainer [data-testid=stColumn]:has(.depthscope-chart){min-width:100%}"
    ".st-key-player [data-testid=stColumn]:first-child{min-width:20rem}"
    ".st-key-player [data-testid=stColumn]:first-child:nth-last-child(n+3){min-width:100%}}"
    "@media (max-width:1150px){.stMainBlockContainer [data-testid=stColumn]:has(.stButtonGroup){min-width:min(28rem,100%)}"
    ".stMainBlockContainer [data-testid=stColumn]:has(.stSelectbox){min-width:11rem}}"
    # While a run grows the page is drawn anew all the time: what stands does not fade before it is really late.
    "[data-stale=true]{transition:opacity .5s ease-in 2s !important}"
    # A run's name is read in full, however long; its colour stands beside it (app/room.py).
    ".stSidebar .stMultiSelect [role=group]{max-height:none}"
    ".stSidebar [data-tag]{max-width:100%;font-size:.85rem;height:auto;background:var(--st-background-color);color:var(--st-text-color);"
    "border:1px solid var(--st-border-color)}"
    ".stSidebar [data-tag]>span{white-space:normal;overflow-wrap:anywhere;max-width:none;line-height:1.3;padding:.15rem 0}"
    ".stSidebar [data-tag] svg{color:var(--st-text-color)}"
    ".stSidebar .stPageLink{margin-bottom:-.6rem} .stSidebar .stMultiSelect,.stSidebar .stTextInput{margin-top:1.2rem}</style>"
)
view.arrive()
pages = [
    st.Page("pages_/runs.py", title="Runs", icon=":material/monitoring:", default=True),
    st.Page("pages_/dilution.py", title="Dilution", icon=":material/water_drop:"),
    st.Page("pages_/gradients.py", title="Gradients", icon=":material/trending_down:"),
    st.Page("pages_/depth_attention.py", title="Depth attention", icon=":material/stacked_line_chart:"),
    st.Page("pages_/tokens.py", title="Tokens", icon=":material/text_fields:"),
    st.Page("pages_/attribution.py", title="Attribution", icon=":material/science:"),
    st.Page("pages_/compare.py", title="Compare", icon=":material/compare_arrows:"),
]
page = st.navigation(pages, position="hidden")
with st.sidebar:
    menu.place(pages)
room.sidebar()
with st.sidebar:  # before the page: the browser reads the library while the page is made
    browser.load()
page.run()
