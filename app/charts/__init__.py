"""Charts: a frame in, an alt.Chart out. Nothing here has heard of Streamlit or of a run."""
