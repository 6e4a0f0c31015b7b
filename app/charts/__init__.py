"""Charts: a frame in, an alt.Chart out. Nothing here has heard of Streamlit or of a run."""

import threading

# Altair's data transformers are one setting for the whole process: whoever changes it takes turns.
TURN = threading.Lock()
