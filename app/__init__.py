"""The dashboard and its charts. In a notebook: `probes.open_run(path).plot.dilution()` is an `alt.Chart`."""

__depthscope__ = True  # other packages are called app, too


def plot(run):
    """The charts of one run, or of several given as a list, for a notebook. See `app.notebook.Plot`."""
    # Imported here: the command line must stay quick to start.
    from app.notebook import Plot

    return Plot(run)
