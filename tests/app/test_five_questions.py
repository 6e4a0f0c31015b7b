"""Five questions of a researcher, answered from what the charts of the sample runs show.

The right answers come from the run's files alone: their JSON and safetensors, with nothing of ours between.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.app.test_pages import mounted, opened, plotted, said

SAMPLES = Path(__file__).resolve().parents[2] / "sample_runs"
CHOOSING = ("full", "block")


class Files:
    """A run as plain arrays and JSON."""

    def __init__(self, name: str):
        self.layout = json.loads((SAMPLES / name / "run.json").read_text())["layout"]
        shards = [load_file(path) for path in sorted((SAMPLES / name / "rank-00000").iterdir())]
        self.rows = {}
        for metric in shards[0]:
            self.rows[metric] = np.concatenate([shard[metric] for shard in shards if metric in shard])

    def last(self, metric: str) -> np.ndarray:
        return self.rows[metric][np.argmax(self.rows[f"{metric}.step"])]

    def label(self, layer: int) -> str:
        told = self.layout["layers"][layer - 1]
        return f"layer {layer} ({'MLP' if told['kind'] == 'mlp' else told['kind']})"

    def read(self, row: int, packed: np.ndarray) -> np.ndarray:
        """What one read (from 0) gives to each of its sources."""
        counts = [read["sources"] for read in self.layout["reads"]]
        start = sum(counts[:row])
        return packed[start : start + counts[row]]


def chart(at, start: str) -> list:
    """The tables of the chart whose title begins so."""
    titles = [data["alt"] for data in mounted(at, "depthscope_chart")]
    return next(
        tables for title, (_, tables) in zip(titles, plotted(at), strict=True) if title.startswith(start)
    )


@pytest.mark.parametrize("name", ["prenorm", "full"])
def test_in_which_layer_does_the_hidden_state_double(name):
    files = Files(name)
    states = files.last("hidden_rms").tolist()
    first = next((i for i, state in enumerate(states) if state >= 2 * states[0]), None)
    right = files.label(first) if first else None  # the state behind layer i is at place i, from 0

    at = opened(SAMPLES, "pages_/dilution.py", runs=[name])
    frame = chart(at, f"{name}’s hidden-state RMS")[0].sort_values("depth")
    values = frame["value"].to_numpy()
    above = np.flatnonzero(values >= 2 * values[0])
    seen = frame["place"].iloc[above[0] - 1].removeprefix("into ") if len(above) else None
    assert seen == right
    expected = (
        f"has doubled by {right} in {name}." if right else f"nowhere comes to twice its first size in {name}."
    )
    assert f"The hidden state {expected}" in said(at)


@pytest.mark.parametrize("name", CHOOSING)
def test_which_source_does_layer_9_read_most_besides_its_neighbour(name):
    files = Files(name)
    weight = files.read(8, files.last("depth_weight"))
    right = files.layout["sources"][int(np.argmax(weight[:-1]))]["label"]

    at = opened(SAMPLES, "pages_/depth_attention.py", runs=[name], focus=name, read="9")
    cells = chart(at, f"{name} at step")[0]
    row = cells[(cells["number"] == 9) & (cells["source"] < len(weight) - 1)]
    assert str(row.loc[row["depth_weight"].idxmax(), "from"]) == right
    assert right in next(data["alt"] for data in mounted(at, "depthscope_chart") if " most" in data["alt"])


@pytest.mark.parametrize("name", CHOOSING)
def test_when_did_the_embedding_stop_mattering(name):
    """It has once its reads give it less than half an even share, on average, and never more again."""
    files = Files(name)
    reads = [row for row, read in enumerate(files.layout["reads"]) if read["sources"] > 2]
    steps = files.rows["depth_weight.step"].tolist()
    shares = []
    for packed in files.rows["depth_weight"]:
        given = [files.read(row, packed) for row in reads]
        shares.append(float(np.mean([weight[0] * len(weight) for weight in given])))
    below = [all(share < 0.5 for share in shares[i:]) for i in range(len(shares))]
    right = steps[below.index(True)] if any(below) else None

    at = opened(SAMPLES, "pages_/depth_attention.py", runs=[name])
    frame = chart(at, "Weight on the embedding")[0]
    late = frame["embedding_even"].to_numpy() < 0.5
    quiet = [bool(late[i:].all()) for i in range(len(late))]
    assert (int(frame["step"].iloc[quiet.index(True)]) if any(quiet) else None) == right
    told = next(
        data["alt"] for data in mounted(at, "depthscope_chart") if "Weight on the embedding" in data["alt"]
    )
    expected = (
        f"{shares[-1]:.1f} even shares" if right is None else f"half an even share since step {right:,}"
    )
    assert expected in told


@pytest.mark.parametrize("name", ["prenorm", "full"])
def test_which_layer_has_the_largest_gradient(name):
    files = Files(name)
    gradients = files.last("output_grad_rms")
    right = files.label(int(np.argmax(gradients[1:])) + 1)

    at = opened(SAMPLES, "pages_/gradients.py", runs=[name])
    frame = chart(at, f"{name}’s largest output gradient RMS")[0]
    layers = frame[frame["depth"] >= 1]
    assert layers.loc[layers["value"].idxmax(), "place"] == right


@pytest.mark.parametrize("name", CHOOSING)
def test_which_sources_does_nobody_read(name):
    """Every read of three sources or more, for whom it is not the newest, gives it less than half an even share."""
    files = Files(name)
    packed = files.last("depth_weight")
    most = {}
    for column, source in enumerate(files.layout["sources"]):
        given = []
        for row, read in enumerate(files.layout["reads"]):
            if read["sources"] > 2 and column < read["sources"] - 1:
                given.append(files.read(row, packed)[column] * read["sources"])
        if len(given) >= 3:
            most[source["label"]] = max(given)
    right = [label for label, share in most.items() if share < 0.5]

    at = opened(SAMPLES, "pages_/depth_attention.py", runs=[name])
    table = next(table for table in chart(at, f"{name}: Sinks") if "role" in table)
    known = table[table["readers"] >= 3]
    assert dict(zip(known["from"], known["most"], strict=True)) == pytest.approx(most)
    assert table.loc[table["role"] == "ballast", "from"].tolist() == right
    told = next(data["alt"] for data in mounted(at, "depthscope_chart") if "Ballast" in data["alt"])
    assert all(label in told for label in right[:6]) and ("leans on: none" in told.split("Ballast")[1]) == (
        not right
    )
