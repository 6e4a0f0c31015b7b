"""The dashboard's charts in a notebook, of one run or of several."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from app import cells, findings, frames
from app.charts import axes, palette
from app.charts.lines import lines
from app.charts.profile import profile
from app.charts.training import over_training
from app.charts.triangle import triangle
from probes import Run


class Plot:
    """Each method returns an `alt.Chart`, titled with what it shows; `step` None is the latest recorded.

    Depth attention of more than about 95 layers has more than Altair's 5,000 rows:
    `alt.data_transformers.disable_max_rows()` first.
    """

    def __init__(self, run: Run | Sequence[Run]):
        runs = [run] if isinstance(run, Run) else list(run)
        names = [one.name for one in runs]
        self._runs = {
            name if names.count(name) == 1 else f"{name} {i}": one
            for i, (name, one) in enumerate(zip(names, runs, strict=True), 1)
        }
        self._colours = palette.assign(list(self._runs), list(self._runs))

    def loss(self, name: str = "loss", *, smooth: int | None = 1, scale: str = "linear") -> alt.LayerChart:
        """A scalar over training; `smooth` recorded points are averaged, None for a fiftieth of the longest run's."""
        window = frames.smoothing(self._runs.values(), name) if smooth is None else smooth
        frame = self._all(lambda run, label: frames.scalar(run, label, name, window=window), name)
        # The title tells of what was recorded, not of averages on the way to the screen.
        title = findings.losses(frames.latest(self._runs, name), name)
        return self._ready(lines(frame, "value", axes.measure(name), self._colours, title, scale))

    def dilution(
        self, name: str = "hidden_rms", *, step: int | None = None, scale: str = "linear"
    ) -> alt.LayerChart:
        """A metric over depth: hidden_rms, output_rms or block_rms."""
        return self._profile(name, step, scale, findings.growth)

    def gradients(
        self, name: str = "output_grad_rms", *, step: int | None = None, scale: str = "log"
    ) -> alt.LayerChart:
        """A gradient over depth; only output_grad_rms and param_grad_norm compare between residual types."""
        return self._profile(name, step, scale, findings.unevenness)

    def over_training(self, name: str = "hidden_rms") -> alt.Chart:
        """A metric of the first run, layer by step."""
        label, run = self._first(name)
        grid = frames.over_training(run, name)
        first, last = (frames.profile(run, label, name, int(run.steps(name)[end])) for end in (0, -1))
        return self._ready(over_training(grid, name, findings.grid(first, last, label, name)))

    def depth_attention(
        self, name: str = "depth_weight", *, step: int | None = None, reads: str = "all"
    ) -> alt.LayerChart:
        """The triangle of the first run: who reads whom, or with `name` "mixing_weight" or "mixing_share" what its states
        are made of. `reads` keeps "attention" or "mlp" reads."""
        label, run = self._first(name)
        frame = cells.cells(run, run.last_step if step is None else step, name, reads)
        wide = frame[frame["sources"] > 2] if (frame["sources"] > 2).any() else frame
        domain = cells.span(wide[name].to_numpy(float))
        return self._ready(triangle(frame, name, findings.picture(frame, label, name), domain))

    def _profile(self, name: str, step: int | None, scale: str, finding) -> alt.LayerChart:
        def part(run: Run, label: str) -> pd.DataFrame:
            return frames.profile(run, label, name, run.last_step if step is None else step)

        frame = self._all(part, name)
        return self._ready(profile(frame, name, self._colours, finding(frame, name), scale))

    def _all(self, part, name: str) -> pd.DataFrame:
        self._first(name)
        return pd.concat([part(run, label) for label, run in self._runs.items()], ignore_index=True)

    def _first(self, name: str) -> tuple[str, Run]:
        """The first run that recorded a metric. Raises KeyError when none did."""
        for label, run in self._runs.items():
            if name in run:
                return label, run
        raise KeyError(f"{', '.join(self._runs)} did not record {name!r}")

    @staticmethod
    def _ready(chart):
        chart = chart.properties(width=640)
        chart.config = palette.PAPER
        return chart
